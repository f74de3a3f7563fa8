"""Code shared by all packages: base errors, the registry, atomic files, typed JSON."""
