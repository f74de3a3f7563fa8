"""Build flat dataclasses from untrusted JSON, checking the type of every field."""

from __future__ import annotations

import math
from dataclasses import MISSING, fields
from types import UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

T = TypeVar("T")
LARGEST_INTEGER = 1 << 62


def from_json(kind: type[T], value: Any) -> T:
    """Build an instance of the dataclass `kind` from the fields of a JSON object.

    Integers must be at most 2**62 in magnitude, and floats must be finite. A field may be missing
    if it has a default.

    Raises:
        ValueError: If `value` is not an object, has an unknown field, lacks a required field, or
            has a field of the wrong type. The message names the field.
    """
    if not isinstance(value, dict):
        raise ValueError(
            f"expected a JSON object with the fields of {kind.__name__}, "
            f"found {type(value).__name__}"
        )
    parts = {part.name: part for part in fields(kind)}  # type: ignore[arg-type]
    unknown = sorted(set(value) - set(parts))
    if unknown:
        raise ValueError(f"unknown field of {kind.__name__}: {', '.join(unknown)[:200]}")
    for name, part in parts.items():
        needed = part.default is MISSING and part.default_factory is MISSING
        if needed and name not in value:
            raise ValueError(f"missing field of {kind.__name__}: {name}")
    hints = get_type_hints(kind)
    for name, field_value in value.items():
        if not _fits(hints[name], field_value):
            hint = hints[name]
            expected = hint.__name__ if isinstance(hint, type) else hint
            raise ValueError(f"{kind.__name__}.{name}={field_value!r:.80}: expected {expected}")
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
        return type(value) is int and abs(value) <= LARGEST_INTEGER
    return type(value) is origin
