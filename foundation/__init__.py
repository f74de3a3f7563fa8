"""Code shared by all packages: base errors, the registry, atomic file writes, typed JSON."""
