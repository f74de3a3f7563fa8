"""Errors that the benchmarks raise."""

from __future__ import annotations

from foundation.errors import FoundryError


class BenchmarkError(FoundryError):
    """Base class of all benchmark errors."""


class PeerError(BenchmarkError):
    """A peer's process failed or timed out; the message ends with the tail of its stderr."""
