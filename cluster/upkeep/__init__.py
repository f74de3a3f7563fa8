"""Small stages that maintain a run: verify, repair, reshard."""
