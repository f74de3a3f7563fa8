"""Create a store and write work items to it."""
