"""Test that byte counts are written in a fitting unit."""

from __future__ import annotations

import pytest

from foundation.units import bytes_text


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1, "1 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (1536 * 1024, "1.5 MiB"),
        (1000 * 2**30, "1000 GiB"),
        (384 * 2**30, "384 GiB"),
        (3 * 2**60, "3072 PiB"),
    ],
)
def test_byte_counts_are_written_in_binary_units(count: int, text: str) -> None:
    assert bytes_text(count) == text
