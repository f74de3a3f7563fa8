"""Status of a run: its progress, store, jobs and results."""
