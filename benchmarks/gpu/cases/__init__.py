"""The kernel cases of `tests/gpu`, run in several processes, with or without pytest."""
