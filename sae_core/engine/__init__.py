"""The DeepSpeed engine, its optimisers and the learning-rate schedule."""
