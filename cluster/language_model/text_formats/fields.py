"""Find the text in a record: fields by path, and the values that are text."""

from __future__ import annotations

from typing import Any

from cluster.language_model.errors import TextError

NESTED_LEVELS = 3
"""Levels of nested fields that error messages list."""


def field_of(record: Any, field: str, where: str) -> Any:
    """Return the value of a field of a record. A record that is text or null is its own value.

    A field that is named `field` takes precedence. Otherwise each dot selects a nested field or, in
    a list, that field of every element.

    Args:
        record: The record.
        field: Name or path of the field, such as `text` or `meta.text`.
        where: Place of the record, for messages.

    Raises:
        TextError: If the record has no such field.
    """
    if record is None or isinstance(record, str):
        return record
    if isinstance(record, dict):
        if field in record:
            return record[field]
        first, _, rest = field.partition(".")
        if rest and first in record:
            return _nested(record, record[first], rest, field, where)
    raise missing_field(record, field, where)


def _nested(record: Any, value: Any, rest: str, field: str, where: str) -> Any:
    """Return the value of the path `rest` below `value`, a part of `record`."""
    if value is None:
        return None
    if isinstance(value, list):
        return [_nested(record, element, rest, field, where) for element in value]
    if isinstance(value, dict):
        if rest in value:
            return value[rest]
        first, _, deeper = rest.partition(".")
        if deeper and first in value:
            return _nested(record, value[first], deeper, field, where)
    raise missing_field(record, field, where)


def as_text(value: Any, field: str, where: str) -> str | None:
    """Return the text of a field's value, or None if it is null.

    The strings of a list are joined by newlines; the nulls among them are left out.

    Raises:
        TextError: If the value is neither text nor a list of texts.
    """
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, list):
        texts = [as_text(element, field, where) for element in value]
        known = [text for text in texts if text is not None]
        return "\n".join(known) if known or not texts else None
    if isinstance(value, dict):
        raise missing_field(value, field, where)
    raise TextError(
        f"{where}: expected text in the field data.text_field={field!r}, or a list of texts; found "
        f"{type(value).__name__} {str(value)[:40]!r}"
    )


def missing_field(record: Any, field: str, where: str) -> TextError:
    """Return the error for a record without text in its field. It lists the record's fields."""
    found = sorted(_paths(record)) if isinstance(record, dict) else type(record).__name__
    return TextError(
        f"{where}: expected text in the field data.text_field={field!r} of each document; found a "
        f"document whose fields or type are {found}"
    )


def _paths(record: dict[str, Any], levels: int = NESTED_LEVELS) -> list[str]:
    """Return the paths of all fields of a record, down to `levels` levels."""
    paths = []
    for name, value in record.items():
        inner = value[0] if isinstance(value, list) and value else value
        if isinstance(inner, dict) and inner and levels > 1:
            paths += [f"{name}.{path}" for path in _paths(inner, levels - 1)]
        else:
            paths.append(str(name))
    return paths
