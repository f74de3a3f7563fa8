"""The run's folder: file names, lock, saved config, metrics log, contents."""
