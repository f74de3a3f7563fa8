"""The first run on a GPU as one command: correctness, then time and memory against predictions."""
