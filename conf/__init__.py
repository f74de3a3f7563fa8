"""Hydra config groups, the typed schema of a run's config, and its validation."""
