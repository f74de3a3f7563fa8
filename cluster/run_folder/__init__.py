"""The run's folder: file names, locks, saved config, metrics log, contents."""
