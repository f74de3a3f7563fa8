"""Scaling laws fitted to the runs of a sweep."""
