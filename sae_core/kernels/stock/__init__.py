"""The kernels in stock torch operations."""
