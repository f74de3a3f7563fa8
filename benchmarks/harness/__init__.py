"""Shared by all benchmarks: timing, tables, the peers' environment."""
