"""Processes that read a growing store: their cursors, and deletion of what they have passed."""
