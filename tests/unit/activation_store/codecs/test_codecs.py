"""Test codecs: our reader, zarr-python and tensorstore agree on rows that any of them wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import tensorstore
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from activation_store import Calibration, ShuffledStream, StoreWriter, open_store, verify_store
from activation_store.checksum import crc32c
from activation_store.codecs.blosc import BloscCompressor
from activation_store.codecs.int8 import Scaling
from activation_store.codecs.sharding import ABSENT
from activation_store.config import StoreConfig
from activation_store.errors import DamagedDataError, NonDeterministicItemError, StoreMismatchError
from activation_store.storage.checksummed_json import dump_checksummed, load_checksummed
from foundation.errors import ConfigError
from tests.support.store_cases import DTYPES, calibration, expected, item_columns, write_store

CODECS = ("none", "blosc", "int8")
ROWS = [16, 5, 0, 16]


def read_tensorstore(path: Path, array: str) -> Any:
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path / array)}}
    return np.asarray(tensorstore.open(spec).result().read().result())


def by_formula(path: Path, array: str, q: NDArray[Any], scale: NDArray[Any]) -> NDArray[Any]:
    """Dequantise int8 rows by the formula in the array's attributes, as other readers would."""
    attributes = zarr.open_array(path / array, mode="r").attrs
    assert attributes["dequantise"] == "mean[c] + scale[t] * (std[c] * q[t, c])"
    mean, std = (np.array(attributes[key], np.float32) for key in ("mean", "std"))
    return mean + scale[:, None] * (std * q)


@settings(max_examples=30, deadline=None)
@given(
    codec=st.sampled_from(CODECS),
    dtype=st.sampled_from(["bfloat16", "float32"]),
    valid_rows=st.lists(st.integers(0, 24), min_size=1, max_size=3),
    width=st.integers(1, 9),
    chunk_bytes=st.integers(1, 200),
    data=st.data(),
)
def test_every_reader_sees_what_was_written(
    tmp_path_factory: pytest.TempPathFactory,
    codec: str,
    dtype: str,
    valid_rows: list[int],
    width: int,
    chunk_bytes: int,
    data: st.DataObject,
) -> None:
    path = tmp_path_factory.mktemp("store") / "s"
    arrays = {"a": width}
    write_store(
        path,
        valid_rows,
        arrays=arrays,
        calibration=calibration(arrays),
        dtype=dtype,
        shard_tokens=24,
        chunk_bytes=chunk_bytes,
        codec=codec,
    )
    store, total = open_store(path), sum(valid_rows)
    rows = expected(valid_rows, arrays, dtype)["a"]
    read = store.read("a", 0, total)
    assert read.dtype == DTYPES[dtype]
    start = data.draw(st.integers(0, total))
    stop = data.draw(st.integers(start, total))
    np.testing.assert_array_equal(store.read("a", start, stop), read[start:stop])
    valid = (np.arange(24)[None, :] < np.array(valid_rows)[:, None]).ravel()
    group = zarr.open_group(path, mode="r")
    for reader in (lambda name: group[name][:], lambda name: read_tensorstore(path, name)):
        found = reader("a")[valid]
        if codec == "int8":
            assert found.dtype == np.int8
            found = by_formula(path, "a", found, reader("a.scale")[valid]).astype(DTYPES[dtype])
        np.testing.assert_array_equal(found.astype(np.float32), read.astype(np.float32))
    if codec == "int8":
        step = np.abs(rows.astype(np.float32)).max(axis=1, initial=1) / 127
        ulp = 2**-8 * np.abs(rows.astype(np.float32))
        assert (
            np.abs(read.astype(np.float32) - rows.astype(np.float32)) <= step[:, None] + ulp
        ).all()
    else:
        np.testing.assert_array_equal(read, rows)
    assert verify_store(path) == []


@pytest.mark.parametrize("by", ["zarr", "tensorstore"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("codec", CODECS)
def test_we_read_shards_that_other_libraries_wrote(
    tmp_path: Path, codec: str, dtype: str, by: str
) -> None:
    """Replace our shard with theirs, add our checksum table and update our record."""
    path, arrays = tmp_path / "s", {"a": 6}
    moments = calibration(arrays)
    write_store(path, [16], arrays=arrays, dtype=dtype, codec=codec, calibration=moments)
    header, before = open_store(path).header, open_store(path).read("a", 0, 16)
    record = path / "_log" / "000000" / "000000000.json"
    document = load_checksummed(str(record), record.read_bytes())
    for name in header.disk_names("a"):
        file = path / header.shard_file(name, 0)
        wanted = zarr.open_array(path / name, mode="r")[:]
        file.unlink()
        if by == "zarr":
            zarr.open_array(path / name, mode="r+")[:] = wanted
        else:
            spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path / name)}}
            tensorstore.open(spec, open=True).result().write(wanted).result()
        theirs = file.read_bytes()
        ours, tail = with_our_table(theirs, header.layout(name).n_chunks)
        file.write_bytes(ours)
        document["arrays"][name] |= {"bytes": len(ours), "tail_crc32c": crc32c(tail)}
    record.write_bytes(dump_checksummed(document))
    (path / "_log" / "000000.json").unlink()
    np.testing.assert_array_equal(open_store(path).read("a", 0, 16), before)
    assert {damage.file for damage in verify_store(path)} == {"_log/000000.json"}


def with_our_table(shard: bytes, n_chunks: int) -> tuple[bytes, bytes]:
    """Insert our checksum table before the index of `shard`; return the result and its tail."""
    split = len(shard) - 16 * n_chunks - 4
    index = np.frombuffer(shard[split:-4], "<u8").reshape(-1, 2)
    assert (index != ABSENT).all()
    table = b"".join(shard[offset + size - 4 : offset + size] for offset, size in index.tolist())
    tail = table + shard[split:]
    return shard[:split] + tail, tail


@pytest.mark.parametrize("codec", ["blosc", "int8"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_metadata_is_what_zarr_python_writes(tmp_path: Path, codec: str, dtype: str) -> None:
    arrays = {"a": 6}
    write_store(
        tmp_path / "s",
        [16],
        arrays=arrays,
        dtype=dtype,
        codec=codec,
        calibration=calibration(arrays),
    )
    header = open_store(tmp_path / "s").header
    packing = zarr.codecs.BloscCodec(
        typesize=DTYPES[dtype].itemsize,
        cname="zstd",
        clevel=1,
        shuffle="shuffle",
        blocksize=262_144,
    )
    for name in header.disk_names("a"):
        part = header.disk_arrays[name]
        zarr.create_array(
            tmp_path / "z" / name,
            shape=(16, *part.row_shape),
            dtype=part.dtype,
            shards=(16, *part.row_shape),
            chunks=(header.chunk_rows, *part.row_shape),
            compressors=[packing] * (codec == "blosc") + [zarr.codecs.Crc32cCodec()],
            fill_value=0,
            chunk_key_encoding={"name": "default", "separator": "."},
        )
        ours, theirs = (
            json.loads((tmp_path / root / name / "zarr.json").read_text()) for root in "sz"
        )
        assert {**ours, "attributes": {}} == theirs


@pytest.mark.parametrize("codec", CODECS)
def test_a_stream_gives_the_rows_that_read_gives(tmp_path: Path, codec: str) -> None:
    arrays = {"a": 6, "b": 3}
    write_store(tmp_path / "s", ROWS, arrays=arrays, codec=codec, calibration=calibration(arrays))
    store = open_store(tmp_path / "s")
    rows = {name: store.read(name, 0, store.n_tokens) for name in (*arrays, "token_id")}
    where = {token: row for row, token in enumerate(rows["token_id"].tolist())}
    options = {"seed": 1, "batch_rows": 7, "window_items": 3, "buffer_rows": 10}
    source = ShuffledStream(store, ["a", "token_id", "b"], **options)  # type: ignore[arg-type]
    for _ in range(10):
        batch = source.next().arrays
        picks = [where[token] for token in batch["token_id"].tolist()]
        for name in arrays:
            assert batch[name].dtype == DTYPES["bfloat16"]
            np.testing.assert_array_equal(batch[name], rows[name][picks])
    source.close()


def massive_rows(n: int, width: int) -> NDArray[np.float32]:
    """Return rows like a language model's activations: large channels and a massive token."""
    rng = np.random.default_rng(0)
    spread = np.exp(rng.normal(0, 1, width))
    spread[3] *= 50
    rows = rng.standard_normal((n, width)) * spread + 5 * spread
    rows[7] *= 1000
    rows[7, 5] = 30_000
    return rows.astype(np.float32)


def test_int8_keeps_every_channel_and_massive_tokens(tmp_path: Path) -> None:
    rows = massive_rows(4096, 256)
    part = Calibration(rows[64:].mean(0), rows[64:].std(0), 1.0)
    writer = StoreWriter(
        tmp_path / "s", {"a": 256}, "float32", 4096, codec="int8", calibration={"a": part}
    )
    writer.write_item(0, rows)
    writer.finalise()
    store = open_store(tmp_path / "s")
    read = store.read("a", 0, 4096)
    others = np.arange(4096) != 7
    error = ((read - rows)[others] ** 2).mean(0)
    assert (error / rows[others].var(0)).max() < 3e-4
    np.testing.assert_allclose(read[7, 5], 30_000, rtol=0.01)  # clipping at 8 std would give 40
    stored = sum(file.stat().st_size for file in (tmp_path / "s").glob("a*/c.*"))
    assert stored < 0.26 * rows.nbytes  # rows are float32
    assert store.statistics("a").absmax == np.abs(rows).max()


def test_int8_edge_cases() -> None:
    scaling = Scaling(np.array([1, 2], np.float32), np.array([2, 0.5], np.float32))
    nan, inf = float("nan"), float("inf")
    rows = np.array([[1, 2], [nan, 2], [3, -inf], [1, 2.5], [1e-40 + 1, 2]], np.float32)
    q, scale = scaling.encode(rows)
    assert q.tolist() == [[0, 0], [0, 0], [0, 0], [0, 127], [0, 0]]
    read = np.empty_like(rows)
    scaling.decode([q, scale], read)
    assert np.isnan(read[1:3]).all(), "a row with a non-finite number must read as all NaN"
    np.testing.assert_array_equal(read[[0, 3, 4]], rows[[0, 3, 4]])


def test_non_finite_int8_rows_are_counted(tmp_path: Path) -> None:
    arrays = {"a": 6}
    writer = StoreWriter(
        tmp_path / "s", arrays, shard_tokens=16, codec="int8", calibration=calibration(arrays)
    )
    rows = item_columns(0, 16, arrays)[0]["a"]
    rows[3, 2], rows[9, 0] = np.nan, np.inf
    writer.write_item(0, rows)
    writer.finalise()
    store = open_store(tmp_path / "s")
    assert store.statistics("a").non_finite == 2
    bad = np.isnan(store.read("a", 0, 16).astype(np.float32)).all(axis=1)
    assert np.flatnonzero(bad).tolist() == [3, 9]


def test_a_constant_channel_does_not_reduce_the_resolution(tmp_path: Path) -> None:
    part = Calibration(np.zeros(3), np.array([0.0, 1.0, 1.0]), 1.0)
    writer = StoreWriter(
        tmp_path / "s", {"a": 3}, "float32", 4, codec="int8", calibration={"a": part}
    )
    rows = np.array([[0, 1, -1], [0, 0.5, 2], [5e-4, 1, -1], [0, 3, 1]], np.float32)
    writer.write_item(0, rows)
    np.testing.assert_allclose(open_store(tmp_path / "s").read("a", 0, 4), rows, atol=0.03)


def test_invalid_codec_settings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"codec='int8': expected a calibration of \['a'\]"):
        StoreWriter(tmp_path / "s", {"a": 4}, codec="int8")
    with pytest.raises(ConfigError, match="codec='zip'"):
        StoreWriter(tmp_path / "s", {"a": 4}, codec="zip")
    with pytest.raises(ConfigError, match=r"arrays='a\.scale'"):
        StoreWriter(tmp_path / "s", {"a": 4, "a.scale": 4})
    with pytest.raises(ConfigError, match=r"store.codec='zip': expected one of: none, blosc, int8"):
        StoreConfig(codec="zip").validate()
    StoreWriter(tmp_path / "s", {"a": 4}, codec="blosc")
    with pytest.raises(StoreMismatchError, match="codec: the store has 'blosc', requested 'none'"):
        StoreWriter(tmp_path / "s", {"a": 4})


@pytest.mark.parametrize("codec", CODECS)
def test_attempts_are_compared_as_they_are_stored(tmp_path: Path, codec: str) -> None:
    arrays = {"a": 6}
    writer = write_store(
        tmp_path / "s", [16], arrays=arrays, codec=codec, calibration=calibration(arrays)
    )
    rows, sidecars = item_columns(0, 16, arrays)
    first = writer.write_item(0, rows, sidecars)
    assert writer.write_item(0, rows, sidecars) == first
    rows["a"][3, 3] += 1
    with pytest.raises(NonDeterministicItemError, match="'a'"):
        writer.write_item(0, rows, sidecars)


def test_blosc_makes_activations_smaller(tmp_path: Path) -> None:
    rows = massive_rows(4096, 256).astype(ml_dtypes.bfloat16)
    writer = StoreWriter(tmp_path / "s", {"a": 256}, shard_tokens=4096, codec="blosc")
    record = writer.write_item(0, rows)
    assert record.arrays["a"].bytes < rows.nbytes / 1.25
    np.testing.assert_array_equal(open_store(tmp_path / "s").read("a", 0, 4096), rows)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("codec", ["blosc", "int8"])
def test_flipped_bytes_are_named(tmp_path: Path, codec: str, dtype: str) -> None:
    path, arrays = tmp_path / "s", {"a": 6}
    write_store(
        path, [16], arrays=arrays, codec=codec, dtype=dtype, calibration=calibration(arrays)
    )
    rows = open_store(path).read("a", 0, 16)
    for file in path.glob("a*/c.*"):
        good = file.read_bytes()
        for place in range(len(good)):
            bad = bytearray(good)
            bad[place] ^= 4
            file.write_bytes(bad)
            damages = verify_store(path)
            assert [damage.file for damage in damages] == [str(file.relative_to(path))]
            try:
                read = open_store(path).read("a", 0, 16)
            except DamagedDataError as error:
                assert file.name in str(error) and "decompress" not in str(error)
            else:  # the flip hit a checksum next to a chunk, which only other readers use
                np.testing.assert_array_equal(read, rows)
        file.write_bytes(good[:-1])
        with pytest.raises(DamagedDataError, match=file.name):
            open_store(path).read("a", 0, 16)
        file.write_bytes(good)
    assert verify_store(path) == []


def test_decompressing_to_a_wrong_size_is_refused() -> None:
    data = np.arange(1000, dtype=np.uint8)
    blosc = BloscCompressor()
    packed = blosc.compress(data, 2)
    for target in (np.zeros(999, np.uint8), np.zeros(1001, np.uint8)):
        with pytest.raises(ValueError, match="holds 1000 bytes"):
            blosc.decompress(packed, target)
    again = np.zeros(1000, np.uint8)
    blosc.decompress(packed, again)
    assert again.tolist() == data.tolist()
