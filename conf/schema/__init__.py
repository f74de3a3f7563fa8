"""The typed config: one file for each YAML group of the application."""
