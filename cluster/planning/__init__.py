"""Arithmetic of the plan stage: memory, step time, traffic, layouts, a simulation of many ranks."""
