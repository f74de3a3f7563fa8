"""The trainer: calibration, steps, metrics, several SAEs in lockstep."""
