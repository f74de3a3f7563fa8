"""Slurm: commands, the batch script, the job's body, Ray across its nodes."""
