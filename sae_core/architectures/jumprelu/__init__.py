"""JumpReLU (Rajamanoharan et al. 2024, arXiv 2407.14435): settings, training, inference."""
