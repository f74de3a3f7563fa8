"""The language model and its text: files, loading, hooks, contexts."""
