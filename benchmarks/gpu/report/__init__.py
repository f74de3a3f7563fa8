"""Predictions compared with measurements, and what follows from the results."""
