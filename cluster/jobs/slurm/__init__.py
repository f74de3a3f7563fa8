"""Slurm: commands, the batch script, the batch process, and Ray across the job's nodes."""
