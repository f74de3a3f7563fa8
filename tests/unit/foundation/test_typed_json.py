"""Test the types of a JSON object's fields."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from foundation.typed_json import from_json


@dataclass
class Row:
    """A typed object."""

    n: int
    share: float | None = None


def test_fields_are_taken_as_they_are():
    assert from_json(Row, {"n": 3, "share": 0.5}) == Row(3, 0.5)
    assert from_json(Row, {"n": 3}) == Row(3)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"n": "3"}, r"Row\.n='3': expected int$"),
        ({"n": 3, "share": "x"}, r"Row\.share='x': expected float \| None$"),
        ({"n": True}, r"Row\.n=True: expected int$"),
        ({"share": 1.0}, r"missing field of Row: n$"),
        ({"n": 1, "m": 2}, r"unknown field of Row: m$"),
        ([3], r"expected a JSON object with the fields of Row, found list$"),
    ],
)
def test_a_wrong_field_is_named(value, message):
    with pytest.raises(ValueError, match=message):
        from_json(Row, value)
