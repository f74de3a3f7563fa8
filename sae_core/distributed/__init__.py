"""The device mesh and the collectives on it."""
