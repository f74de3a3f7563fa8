"""Benchmarks, one command per table; each table records hardware, versions, commit and command."""
