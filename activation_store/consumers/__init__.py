"""Consumers, which read a growing store: their cursors, and deletion of what all have read."""
