"""Arithmetic of the plan stage: memory, step time, traffic, layouts, simulation of many ranks."""
