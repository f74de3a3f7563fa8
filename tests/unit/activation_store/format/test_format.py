"""Test the format on disk: our reader, zarr-python and tensorstore read the same numbers."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import tensorstore
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from activation_store import StoreWriter, open_store, verify_store
from activation_store.errors import StoreFormatError
from activation_store.format.header import StoreHeader, header_checksum, largest_chunk_rows
from foundation.errors import ConfigError
from tests.support.store_cases import DTYPES, expected, tree, write_store


def read_tensorstore(path: Path, array: str) -> Any:
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path / array)}}
    return np.asarray(tensorstore.open(spec).result().read().result())


@settings(max_examples=25, deadline=None)
@given(
    valid_rows=st.lists(st.integers(0, 24), max_size=4),
    dtype=st.sampled_from(["bfloat16", "float32"]),
    widths=st.lists(st.integers(1, 9), min_size=1, max_size=2),
    shard_tokens=st.sampled_from([24, 25, 32]),
    chunk_bytes=st.integers(1, 200),
    data=st.data(),
)
def test_every_reader_sees_what_was_written(
    tmp_path_factory: pytest.TempPathFactory,
    valid_rows: list[int],
    dtype: str,
    widths: list[int],
    shard_tokens: int,
    chunk_bytes: int,
    data: st.DataObject,
) -> None:
    path = tmp_path_factory.mktemp("store") / "s"
    arrays = {f"model.layers.{i}": width for i, width in enumerate(widths)}
    write_store(
        path,
        valid_rows,
        arrays=arrays,
        dtype=dtype,
        shard_tokens=shard_tokens,
        chunk_bytes=chunk_bytes,
    )
    store = open_store(path)
    total = sum(valid_rows)
    assert (store.n_items, store.n_tokens) == (len(valid_rows), total)
    assert store.valid_rows.tolist() == valid_rows
    if not valid_rows:
        return
    start = data.draw(st.integers(0, total))
    stop = data.draw(st.integers(start, total))
    group = zarr.open_group(path, mode="r")
    is_valid = np.arange(shard_tokens)[None, :] < np.array(valid_rows)[:, None]
    assert group["valid_rows"][:].tolist() == valid_rows
    for name, rows in expected(valid_rows, arrays, dtype).items():
        read = store.read(name, 0, total)
        assert read.dtype == rows.dtype or name not in arrays
        np.testing.assert_array_equal(read, rows)
        np.testing.assert_array_equal(store.read(name, start, stop), rows[start:stop])
        for other in (group[name][:], read_tensorstore(path, name)):
            assert other.shape[0] == len(valid_rows) * shard_tokens
            np.testing.assert_array_equal(other[is_valid.ravel()], rows)
            assert not other[~is_valid.ravel()].any()
    assert verify_store(path) == []


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_metadata_is_what_zarr_python_writes(tmp_path: Path, dtype: str) -> None:
    write_store(tmp_path / "s", [16, 3], dtype=dtype)
    for name, shape in (("model.layers.9", (32, 6)), ("document", (32,))):
        chunks = (open_store(tmp_path / "s").header.chunk_rows, *shape[1:])
        zarr.create_array(
            tmp_path / "z" / name,
            shape=shape,
            dtype=DTYPES[dtype] if len(shape) == 2 else np.int64,
            shards=(16, *shape[1:]),
            chunks=chunks,
            compressors=[zarr.codecs.Crc32cCodec()],
            fill_value=0,
            chunk_key_encoding={"name": "default", "separator": "."},
        )
        ours, theirs = (
            json.loads((tmp_path / root / name / "zarr.json").read_text()) for root in "sz"
        )
        assert ours == theirs


def test_zarr_reads_bfloat16_in_either_order_of_imports(tmp_path: Path) -> None:
    write_store(tmp_path / "s", [16])
    read = f"print(zarr.open({str(tmp_path / 's')!r})['model.layers.9'][:].dtype)"
    for imports in ("import activation_store, zarr", "import zarr, activation_store"):
        command = [sys.executable, "-c", f"{imports}; {read}"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == "bfloat16"


def test_opening_needs_no_zarr(tmp_path: Path) -> None:
    write_store(tmp_path / "s", [16])
    check = f"""
import sys, activation_store.config
assert "numpy" not in sys.modules
from activation_store import open_store
open_store({str(tmp_path / "s")!r}).read("model.layers.9", 0, 16)
assert not {{"zarr", "torch", "ray"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", check], check=True)


def test_zarr_lists_the_arrays_and_nothing_else(tmp_path: Path) -> None:
    write_store(tmp_path / "s", [16])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        names = {name for name, _ in zarr.open_group(tmp_path / "s", mode="r").members()}
    assert names == {"model.layers.9", "token_id", "document", "position", "valid_rows"}


def test_hookpoints_of_all_kinds_are_names_of_arrays(tmp_path: Path) -> None:
    arrays = {"h.0@input": 6, "h.0@input[head=3,part=-1]": 4}
    write_store(tmp_path / "s", [16], arrays=arrays)
    group, store = zarr.open_group(tmp_path / "s", mode="r"), open_store(tmp_path / "s")
    assert store.arrays == arrays
    for name, rows in expected([16], arrays).items():
        for read in (store.read(name, 0, 16), group[name][:16]):
            np.testing.assert_array_equal(read, rows)
        if name in arrays:
            np.testing.assert_array_equal(read_tensorstore(tmp_path / "s", name)[:16], rows)


def test_bfloat16_fill_values_survive_zarr(tmp_path: Path) -> None:
    for value in (0.0, 1.5, float("inf"), float("-inf"), float("nan")):
        array = zarr.create_array(
            tmp_path / f"{value}", shape=(3,), dtype=DTYPES["bfloat16"], fill_value=value
        )
        again = zarr.open_array(tmp_path / f"{value}", mode="r")
        np.testing.assert_array_equal(again[:].astype(float), np.full(3, value))
        array[1] = 2.5
        assert again[1] == ml_dtypes.bfloat16(2.5)


@pytest.mark.parametrize(
    ("widths", "dtype", "shard_tokens", "chunk_bytes", "rows"),
    [
        ([768], "bfloat16", 8192, 1 << 20, 512),
        ([4096], "bfloat16", 8192, 1 << 20, 128),
        ([768, 4096], "bfloat16", 8192, 1 << 20, 128),
        ([768], "float32", 8192, 1 << 20, 256),
        ([4], "float32", 24, 1 << 20, 24),
        ([4], "float32", 24, 16 * 16, 12),
        ([4], "float32", 7, 100, 1),
        ([4096], "float32", 8192, 1, 1),
    ],
)
def test_chunk_rows(
    widths: list[int], dtype: str, shard_tokens: int, chunk_bytes: int, rows: int
) -> None:
    row_bytes = max(widths) * DTYPES[dtype].itemsize
    assert largest_chunk_rows(row_bytes, shard_tokens, chunk_bytes) == rows


def test_hostile_metadata_is_refused(tmp_path: Path) -> None:
    write_store(tmp_path / "s", [16])
    file = tmp_path / "s" / "zarr.json"
    good = json.loads(file.read_text())
    hostile: list[dict[str, Any]] = [
        {"arrays": {"../../etc": {"d_model": 6}}},
        {"arrays": {"a/b": {"d_model": 6}}},
        {"arrays": {"a..b": {"d_model": 6}}},
        {"arrays": {"": {"d_model": 6}}},
        {"arrays": {"_log": {"d_model": 6}}},
        {"arrays": {"token_id": {"d_model": 6}}},
        {"arrays": {"x": {"d_model": 2**62}}},
        {"arrays": {"x": {"d_model": -1}}},
        {"arrays": {"x": {"d_model": True}}},
        {"arrays": {"x": {"d_model": 1e3}}},
        {"arrays": {}},
        {"arrays": {f"x{i}": {"d_model": 1} for i in range(5000)}},
        {"arrays": 3},
        {"shard_tokens": 2**60},
        {"shard_tokens": 2**24, "chunk_rows": 1},
        {"shard_tokens": 0},
        {"chunk_rows": 0},
        {"chunk_rows": 3},
        {"chunk_rows": 32},
        {"planned_items": 10**18},
        {"n_items": 10**9},
        {"n_items": -1},
        {"n_tokens": 17},
        {"dtype": "float8"},
        {"dtype": []},
        {"sidecars": ["../x"]},
        {"provenance": []},
        {"calibration": {"model.layers.9": {"mean": [1.0], "std": [1.0], "norm": 1.0}}},
        {"calibration": {"other": {"mean": [], "std": [], "norm": 1.0}}},
        {"calibration": []},
        {"schema_version": 2},
        {"unknown": 1},
    ]
    for change in hostile:
        document = json.loads(json.dumps(good))
        header = document["attributes"]["activation_store"]
        header.pop("crc32c")
        header.update(change)
        header["crc32c"] = header_checksum(header)  # valid, so the values must be refused
        file.write_text(json.dumps(document))
        with pytest.raises(
            StoreFormatError, match=r"zarr\.json.*(invalid header|schema_version=2)"
        ):
            open_store(tmp_path / "s")


def test_oversized_metadata_is_not_parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_store(tmp_path / "s", [16])
    file = tmp_path / "s" / "zarr.json"
    file.write_text("[" * 200_000)
    with pytest.raises(StoreFormatError, match=r"zarr.json"):
        open_store(tmp_path / "s")
    monkeypatch.setattr("activation_store.format.zarr_json._MAX_BYTES", 1000)
    with pytest.raises(StoreFormatError, match="has 200000 bytes: expected at most 1000"):
        open_store(tmp_path / "s")
    (tmp_path / "other").mkdir()
    with pytest.raises(StoreFormatError, match="not an activation store"):
        open_store(tmp_path / "other")


def test_a_writer_refuses_what_a_reader_would_refuse(tmp_path: Path) -> None:
    for arrays, options in (
        ({"a/b": 4}, {}),
        ({"..": 4}, {}),
        ({}, {}),
        ({"a": 0}, {}),
        ({"a": 4}, {"dtype": "float16"}),
        ({"a": 4}, {"shard_tokens": 0}),
        ({"a": 4}, {"chunk_bytes": 0}),
        ({"a": 4}, {"n_items": 0}),
        ({"a": 4}, {"provenance": {"x": float("nan")}}),
    ):
        with pytest.raises(ConfigError):
            StoreWriter(tmp_path / "s", arrays, **options)
    assert not (tmp_path / "s").exists() and tree(tmp_path) == {}


def test_header_round_trips_through_json() -> None:
    header = StoreHeader({"a": 3, "b": 2}, "float32", 8, 4, 5, {"model": "m", "n": [1, 2]})
    document = json.loads(json.dumps(header.to_json()))
    assert document.pop("crc32c") == header_checksum(document)
