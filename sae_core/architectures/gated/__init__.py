"""Gated SAE (Rajamanoharan et al. 2024, arXiv 2404.16014): settings, training, inference."""
