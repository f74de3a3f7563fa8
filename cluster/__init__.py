"""Ray: harvest workers, trainer ranks, sessions and placement; the language model and its text."""
