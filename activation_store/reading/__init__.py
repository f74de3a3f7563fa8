"""Read a store: rows in order, shuffled streams, look-ups, mixtures."""
