"""Base of all errors raised on purpose, and the error for a bad setting."""

from __future__ import annotations

from activation_store.errors import StoreError
from sae_core.errors import SAEError


class StoreConfigError(StoreError, ValueError):
    """An invalid setting or argument.

    Args:
        key: Name of the setting or argument.
        value: The value that was given.
        expected: Noun phrase that completes "expected ...".
        remedy: What the user should do, if that is not obvious.
    """

    def __init__(self, key: str, value: object, expected: str, remedy: str = "") -> None:
        message = f"{key}={value!r}: expected {expected}"
        super().__init__(f"{message}; {remedy}" if remedy else message)
        self._arguments = (key, value, expected, remedy)

    def __reduce__(self) -> tuple[type, tuple[str, object, str, str]]:
        # Errors are pickled between processes; the default would call the class with the message.
        return type(self), self._arguments


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
