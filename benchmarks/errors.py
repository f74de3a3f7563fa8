"""What can go wrong in a benchmark."""

from __future__ import annotations


class BenchmarkError(Exception):
    """Base of every error the benchmarks raise on purpose."""


class PeerError(BenchmarkError):
    """A peer's training step did not run in its environment: carries the end of what it said."""
