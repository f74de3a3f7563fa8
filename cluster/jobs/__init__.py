"""Submit a run as a job: Slurm, Ray, or a file for KubeRay or SkyPilot."""
