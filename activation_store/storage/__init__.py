"""Storage of a store's files in a local folder or an object store, with a common interface."""
