"""Harvest workers, trainer ranks and job submission on Ray. The language model and its text."""
