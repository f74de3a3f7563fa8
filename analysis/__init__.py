"""Read the output of the other stages: evaluate, export, report, status, scaling laws."""
