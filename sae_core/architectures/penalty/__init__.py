"""What the kinds that are sparse by a penalty share: warm-up, dense autograd, inference."""
