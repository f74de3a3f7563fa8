"""Parts that measure: the device, products, kernels and whole steps."""
