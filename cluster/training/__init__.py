"""Train SAEs on a store: driver, ranks, sources, watchdog."""
