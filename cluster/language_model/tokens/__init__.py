"""Tokens of a text: its boundaries, the part that is held out, and the contexts."""
