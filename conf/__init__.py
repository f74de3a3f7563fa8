"""Hydra groups, the typed schema, and what the config alone shows to be wrong."""
