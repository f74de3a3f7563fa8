"""Flat dataclasses from JSON that somebody else may have written, every type checked."""

from __future__ import annotations

import math
from dataclasses import MISSING, fields
from types import UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

T = TypeVar("T")
_LARGEST = 1 << 62


def from_json(kind: type[T], value: Any) -> T:
    """An instance of the dataclass `kind` with the fields of a JSON object.

    Whole numbers are bounded, other numbers finite; a field may be left out where it has a default.

    Raises:
        ValueError: `value` is no object, has other fields, or one of another type; names it.
    """
    if not isinstance(value, dict):
        raise ValueError(f"expected an object of a {kind.__name__}, found {type(value).__name__}")
    parts = {part.name: part for part in fields(kind)}  # type: ignore[arg-type]
    unknown = sorted(set(value) - set(parts))
    if unknown:
        raise ValueError(f"a {kind.__name__} has no {', '.join(unknown)[:200]}")
    for name, part in parts.items():
        needed = part.default is MISSING and part.default_factory is MISSING
        if needed and name not in value:
            raise ValueError(f"a {kind.__name__} needs {name}")
    hints = get_type_hints(kind)
    for name, field_value in value.items():
        if not _fits(hints[name], field_value):
            raise ValueError(f"{name}={field_value!r:.80} of a {kind.__name__}: not {hints[name]}")
    return kind(**value)


def _fits(hint: Any, value: Any) -> bool:
    if isinstance(hint, UnionType):
        return any(_fits(option, value) for option in get_args(hint))
    origin = get_origin(hint) or hint
    if origin is Any:
        return True
    if origin is dict:
        key, inner = get_args(hint) or (Any, Any)
        return isinstance(value, dict) and all(
            _fits(key, k) and _fits(inner, v) for k, v in value.items()
        )
    if origin is float:
        return type(value) in (int, float) and math.isfinite(value)
    if origin is int:
        return type(value) is int and abs(value) <= _LARGEST
    return type(value) is origin
