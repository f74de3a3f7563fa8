"""Suggest how to write a setting that Hydra refuses, for the error on the command line."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import is_dataclass
from typing import Any, get_args, get_origin, get_type_hints

from conf.schema.run import RunConfig
from foundation.errors import ConfigError

_MAX_INTEGER = 1e18
_ACCEPTED: dict[type, tuple[type, ...]] = {
    str: (str, bool, int, float),
    bool: (bool,),
    int: (int,),
    float: (int, float),
    list: (list,),
}
"""Types of the values that Hydra parses, by the types of settings that take them."""


def suggestion(arguments: Sequence[str]) -> str | None:
    """Return the first argument that has a correct spelling, in that spelling, for a shell.

    Args:
        arguments: The arguments of the command line.

    Returns:
        For example `model.hookpoints=[transformer.h.1]` in quotes, or None if every argument is
        correct or none has a spelling that is known to be.
    """
    for index, argument in enumerate(arguments):
        following = arguments[index + 1] if index + 1 < len(arguments) else ""
        written = _corrected(argument, following)
        if written is not None:
            return shlex.quote(written)
    return None


def require_no_dashes(arguments: Sequence[str]) -> None:
    """Check that no setting is written like an option, such as `--name x`.

    Raises:
        ConfigError: With the correct spelling.
    """
    for index, argument in enumerate(arguments):
        match = re.fullmatch(r"--?([A-Za-z][\w.]*)(=.*)?", argument, flags=re.DOTALL)
        if match is None or _kind(match[1]) is None:
            continue
        following = arguments[index + 1] if index + 1 < len(arguments) else "VALUE"
        written = shlex.quote(f"{match[1]}{match[2] or f'={following}'}")
        raise ConfigError(
            "argument", argument, "settings as key=value, without dashes", f"write {written}"
        )


def _corrected(argument: str, following: str) -> str | None:
    """Return the correct spelling of an argument, or None if it is correct or none is known."""
    if argument.startswith("-"):
        return None
    key, equals, value = argument.partition("=")
    if not equals:
        return f"{key}={following or 'VALUE'}" if _kind(key) is not None else None
    key, value = key.strip(), value.strip()
    kind = _kind(key)
    if kind is None:
        return None
    for written in (argument, f"{key}={value}", *_spellings(key, value, kind)):
        if _fits(written, kind):
            return None if written == argument else written
    return None


def _spellings(key: str, value: str, kind: type) -> list[str]:
    """Return how a value of the setting's type may have been meant, most likely first."""
    if kind is list:
        items = [item.strip() for item in value.strip("[]").split(",") if item.strip()]
        quoted = ",".join(_quoted(item) for item in items)
        return [f"{key}=[{','.join(items)}]", f"{key}=[{quoted}]"]
    if kind is int:
        number = _integer(value)
        return [] if number is None else [f"{key}={number}"]
    if kind is str:
        return [f"{key}={_quoted(value)}"]
    return []


def _integer(value: str) -> int | None:
    """Return the integer that `2e6`, `1,000` or `3.0` stands for, or None."""
    try:
        number = float(value.replace(",", "").replace("_", "").replace(" ", ""))
    except ValueError:
        return None
    return int(number) if number.is_integer() and abs(number) < _MAX_INTEGER else None


def _quoted(value: str) -> str:
    value = value.strip("'\"")
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _fits(argument: str, kind: type) -> bool:
    """Return True if Hydra parses the argument to a value of the setting's type."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        override = OverridesParser.create().parse_override(argument)
        if override.is_sweep_override():
            return False
        value = override.value()
    except HydraException:
        return False
    if isinstance(value, bool) and kind in (int, float):
        return False
    return value is None or isinstance(value, _ACCEPTED[kind])


def _kind(key: str) -> type | None:
    """Return the type of a setting, or None if there is no such setting."""
    group: Any = RunConfig()
    *groups, name = key.lstrip("+~").split(".")
    for part in groups:
        group = getattr(group, part, None)
    if not is_dataclass(group):
        return None
    declared = get_type_hints(type(group)).get(name)
    kinds = [get_origin(one) or one for one in get_args(declared) or (declared,)]
    if get_origin(declared) in (list, dict):
        kinds = [get_origin(declared)]
    return next((kind for kind in kinds if kind in _ACCEPTED), None)
