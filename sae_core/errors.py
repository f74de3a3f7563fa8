"""Exceptions of `sae_core`. Messages give the value, what was expected, and what to do."""

from __future__ import annotations

from foundation.errors import EXIT_FAILED, FoundryError


class SAEError(FoundryError):
    """Base class of every error that this package raises on purpose."""


class CheckpointError(SAEError):
    """A checkpoint could not be written, or no valid checkpoint could be read."""

    exit_code = EXIT_FAILED


class DamagedCheckpointError(CheckpointError):
    """A checkpoint folder does not match its manifest; the message names file and difference."""


class NonFiniteLossError(SAEError):
    """The loss or its gradient was not finite on some rank; no update was made from it."""

    exit_code = EXIT_FAILED


class DivergedError(SAEError):
    """Training has diverged: the fraction of variance unexplained is above the configured limit."""


class ShapeError(SAEError, ValueError):
    """A tensor has a shape or dtype that the operation does not support."""
