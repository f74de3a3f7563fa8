"""Train SAEs on a store: driver, ranks, activation sources, watchdog."""
