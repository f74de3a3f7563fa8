"""Offline HTML pages of runs and of scaling laws."""
