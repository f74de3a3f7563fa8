"""What the two libraries share: base errors, atomic files, typed JSON."""
