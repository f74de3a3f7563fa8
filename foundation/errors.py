"""The base of all errors raised on purpose, the exit codes, and the error for a bad setting."""

from __future__ import annotations

from typing import ClassVar

EXIT_FAILED = 1
"""The run itself failed; running the same command again may help."""
EXIT_BAD_INPUT = 2
"""The command, the config or the input data must be changed."""
EXIT_PREEMPTED = 75
"""EX_TEMPFAIL: a signal asked the run to stop; run the same command again to resume."""


class FoundryError(Exception):
    """Base of every error that is raised on purpose: its text is a message for the user.

    Attributes:
        exit_code: Exit code of a process that ends with this error.
    """

    exit_code: ClassVar[int] = EXIT_BAD_INPUT


class ConfigError(FoundryError, ValueError):
    """A setting has a value that is not allowed.

    Args:
        key: Name of the setting, such as `sae.k`.
        value: Its value.
        expected: What is allowed, as a noun phrase.
        remedy: How to fix it, as an imperative; may be empty.
    """

    def __init__(self, key: str, value: object, expected: str, remedy: str = "") -> None:
        message = f"{key}={value!r}: expected {expected}"
        super().__init__(f"{message}; {remedy}" if remedy else message)
        self._arguments = (key, value, expected, remedy)

    def __reduce__(self) -> tuple[type, tuple[str, object, str, str]]:
        # Errors are pickled between processes. By default, unpickling would call this class with
        # the message as its only argument.
        return type(self), self._arguments
