"""The encoder product fused with TopK: its kernels, their candidates, and the choice among them."""
