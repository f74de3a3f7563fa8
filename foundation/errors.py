"""The base class of all expected errors, the exit codes, and the error for an invalid setting."""

from __future__ import annotations

from typing import ClassVar

EXIT_FAILED = 1
"""The run itself failed; running the same command again may help."""
EXIT_BAD_INPUT = 2
"""The command, the config or the input data must be changed."""
EXIT_PREEMPTED = 75
"""A signal asked the run to stop; running the same command again resumes it (EX_TEMPFAIL)."""


class FoundryError(Exception):
    """Base class of every expected error, whose text is a message for the user.

    Attributes:
        exit_code: Exit code of a process that ends with this error.
    """

    exit_code: ClassVar[int] = EXIT_BAD_INPUT


class ConfigError(FoundryError, ValueError):
    """A setting has a value that is not allowed.

    Args:
        key: Name of the setting, such as `sae.k`.
        value: Value of the setting.
        expected: Description of the allowed values, as a noun phrase.
        remedy: How to fix the setting, as an imperative; may be empty.
    """

    def __init__(self, key: str, value: object, expected: str, remedy: str = "") -> None:
        message = f"{key}={value!r}: expected {expected}"
        super().__init__(f"{message}; {remedy}" if remedy else message)
        self._arguments = (key, value, expected, remedy)

    def __reduce__(self) -> tuple[type, tuple[str, object, str, str]]:
        # Errors are pickled when they are sent between processes. By default, unpickling would call
        # this class with the message as its only argument.
        return type(self), self._arguments
