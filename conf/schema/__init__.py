"""The typed config, with one file for each YAML group of the application."""
