"""Read the output of the other stages: evaluate, export, report and fit scaling laws."""
