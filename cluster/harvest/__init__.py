"""Run the language model over text and write its activations to the store."""
