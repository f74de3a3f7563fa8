"""Train a grid of SAEs over one store."""
