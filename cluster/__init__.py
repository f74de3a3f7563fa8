"""Harvest workers, trainer ranks and job submission on Ray; the language model and its text."""
