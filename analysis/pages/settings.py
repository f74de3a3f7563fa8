"""Turn nested settings into rows of text for a page."""

from __future__ import annotations

from typing import Any

from analysis.number_format import value_text


def tree(value: Any) -> Any:
    """Convert a nested config for the template: lists of (key, subtree | text)."""
    if isinstance(value, dict):
        return [(str(key), tree(item)) for key, item in value.items()]
    return value_text(value)


def flat(values: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Flatten nested dicts into rows of (dotted key, text)."""
    rows: list[tuple[str, str]] = []
    for key, value in values.items():
        if isinstance(value, dict):
            rows += flat(value, f"{prefix}{key}.")
        else:
            rows.append((f"{prefix}{key}", value_text(value, str(key))))
    return rows
