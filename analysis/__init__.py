"""Reads what the other stages wrote: evaluation, export and the report of a run."""
