"""How far a run has come: its progress, store, jobs and results."""
