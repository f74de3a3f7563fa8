"""Test that the codec benchmark measures every codec, those of other packages too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from activation_store import CODECS, open_store
from benchmarks.codecs import measure
from tests.support.store_cases import calibration, write_store
from tests.support.toys.codec import Halves


def test_every_codec_has_a_row(tmp_path: Path) -> None:
    arrays = {"a": 16}
    options: dict[str, Any] = {"arrays": arrays, "shard_tokens": 2048, "chunk_bytes": 4096}
    write_store(tmp_path / "source", [2048] * 3, calibration=calibration(arrays), **options)
    source = open_store(tmp_path / "source")
    with CODECS.registered("halves", Halves()):
        rows = measure(source, 2, tmp_path / "copies", rounds=1)
        assert [row["op"] for row in rows] == ["none", "blosc", "int8", "halves"]
        # Equal rows per chunk give every codec the same batches.
        copies = [open_store(tmp_path / "copies" / row["op"]) for row in rows]
        assert {copy.header.chunk_rows for copy in copies} == {source.header.chunk_rows}
    lost = {row["op"]: row["row_fvu"] for row in rows}
    assert lost["none"] == lost["blosc"] == 0
    assert 0 < lost["halves"] < lost["int8"] == pytest.approx(0, abs=1e-3)
