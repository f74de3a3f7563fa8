"""The language model and its input text: files, loading, hooks, contexts."""
