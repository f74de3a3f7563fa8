"""What all benchmarks share: timing, tables, the peers' environment."""
