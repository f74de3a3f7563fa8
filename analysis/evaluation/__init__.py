"""Held-out evaluation: metrics of the SAE alone and spliced into the language model."""
