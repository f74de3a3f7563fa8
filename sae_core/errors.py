"""Exceptions of `sae_core`. Messages give the value, what was expected, and what to do."""

from __future__ import annotations

from foundation.errors import EXIT_FAILED, FoundryError


class SAEError(FoundryError):
    """Base class of every error that this package raises on purpose."""


class CheckpointError(SAEError):
    """A checkpoint could not be written, or no valid checkpoint could be read."""

    exit_code = EXIT_FAILED


class DamagedCheckpointError(CheckpointError):
    """A file of a checkpoint is damaged or invalid; the message names the file and the problem."""


class NonFiniteLossError(SAEError):
    """The loss or its gradient was not finite on some rank; no weight was updated with it."""

    exit_code = EXIT_FAILED


class DivergedError(SAEError):
    """Training has diverged: the FVU is above the configured limit, or not finite."""


class ShapeError(SAEError, ValueError):
    """A tensor has a shape or dtype that the operation does not support."""
