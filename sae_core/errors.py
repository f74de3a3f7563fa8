"""What can go wrong in the trainer, each with the value, what was expected and what mends it."""

from __future__ import annotations


class SAEError(Exception):
    """Base of every error this package raises on purpose."""


class ConfigError(SAEError, ValueError):
    """A setting that cannot be: names the key, its value, what was expected and the remedy."""

    def __init__(self, key: str, value: object, expected: str, remedy: str = "") -> None:
        message = f"{key}={value!r}: expected {expected}"
        super().__init__(f"{message}; {remedy}" if remedy else message)
        self._arguments = (key, value, expected, remedy)

    def __reduce__(self) -> tuple[type, tuple[str, object, str, str]]:
        # Errors travel between processes, and the default would call this class with the message.
        return type(self), self._arguments


class CheckpointError(SAEError):
    """A checkpoint cannot be written, or none that is valid can be read."""


class DamagedCheckpointError(CheckpointError):
    """One checkpoint folder fails its manifest: names the file and what differs."""


class NonFiniteLossError(SAEError):
    """The loss, or its gradient, was NaN or infinite on some rank; no update was made from it."""


class DivergedError(SAEError):
    """Training goes nowhere: its FVU is above the limit that somebody set for it."""


class ShapeError(SAEError, ValueError):
    """A tensor whose shape or dtype an operation cannot take."""
