"""Read a store: rows in order, shuffled streams, lookups, mixtures of stores."""
