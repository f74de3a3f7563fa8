"""TopK with AuxK (Gao et al. 2024, arXiv 2406.04093): settings, training, inference."""
