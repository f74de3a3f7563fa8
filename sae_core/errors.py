"""Exceptions of `sae_core`. Messages give the value, what was expected, and what to do."""

from __future__ import annotations


class SAEError(Exception):
    """Base class of every error that this package raises on purpose."""


class ConfigError(SAEError, ValueError):
    """An invalid setting.

    The message reads `key=value: expected {expected}; {remedy}`.

    Args:
        key: Full name of the config key.
        value: Its value.
        expected: Noun phrase for the valid values.
        remedy: Imperative sentence that says what to do; may be empty.
    """

    def __init__(self, key: str, value: object, expected: str, remedy: str = "") -> None:
        message = f"{key}={value!r}: expected {expected}"
        super().__init__(f"{message}; {remedy}" if remedy else message)
        self._arguments = (key, value, expected, remedy)

    def __reduce__(self) -> tuple[type, tuple[str, object, str, str]]:
        # Errors are sent between processes. The default would rebuild this class from its message
        # alone, which is not what the constructor takes.
        return type(self), self._arguments


class CheckpointError(SAEError):
    """A checkpoint could not be written, or no valid checkpoint could be read."""


class DamagedCheckpointError(CheckpointError):
    """A checkpoint folder does not match its manifest; names the file and the difference."""


class NonFiniteLossError(SAEError):
    """The loss or its gradient was not finite on some rank; no update was made from it."""


class DivergedError(SAEError):
    """Training has diverged: its FVU is above the configured limit."""


class ShapeError(SAEError, ValueError):
    """A tensor has a shape or dtype that the operation does not support."""
