"""Small stages that look after a run: verify, repair, reshard."""
