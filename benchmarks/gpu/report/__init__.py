"""Predictions beside measurements, and what follows from the results."""
