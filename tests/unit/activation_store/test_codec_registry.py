"""Test that a codec from outside the package works everywhere, without an edit of the package."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from activation_store import (
    CODECS,
    Codec,
    DiskArray,
    ShuffledStream,
    StagedStream,
    StoreWriter,
    open_store,
    repair_store,
    store_exists,
    verify_store,
)
from activation_store.config import StoreConfig
from activation_store.errors import CodecError, DamagedDataError, UnknownCodecError
from activation_store.format import commit_log
from foundation.errors import ConfigError
from tests.support.store_cases import DTYPES, calibration, expected, item_columns, tree, write_store
from tests.support.toys.codec import PEAK, HalfRows, Halves, Masked

ARRAYS = {"a": 6, "b": 3}
ROWS = [16, 5, 0, 16, 9]
OPTIONS: dict[str, Any] = {"arrays": ARRAYS, "codec": "halves", "calibration": calibration(ARRAYS)}
ORDER: dict[str, Any] = {"seed": 1, "batch_rows": 7, "window_items": 3, "buffer_rows": 10}


@pytest.fixture
def toy() -> Iterator[None]:
    with CODECS.registered("halves", Halves()):
        yield


def decoded(name: str, rows: NDArray[Any], dtype: str) -> NDArray[Any]:
    """Return rows as the toy's formula gives them back."""
    mean = calibration(ARRAYS)[name].mean.astype(np.float32)
    centred = rows.astype(np.float32) - mean
    peak = np.abs(centred).max(axis=1, keepdims=True)
    half = (centred / peak).astype(np.float16).astype(np.float32)
    return (mean + peak * half).astype(DTYPES[dtype])


@pytest.mark.usefixtures("toy")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_rows_and_streams_of_a_toy_codec(tmp_path: Path, dtype: str) -> None:
    path = tmp_path / "s"
    StoreConfig(codec="halves").validate()
    write_store(path, ROWS, dtype=dtype, **OPTIONS)
    assert verify_store(path) == []
    store = open_store(path)
    rows = {name: store.read(name, 0, store.n_tokens) for name in (*ARRAYS, "token_id")}
    for name in ARRAYS:
        wanted = decoded(name, expected(ROWS, ARRAYS, dtype)[name], dtype)
        np.testing.assert_array_equal(rows[name], wanted)
        np.testing.assert_array_equal(store.read(name, 3, 19), wanted[3:19])
    where = {token: row for row, token in enumerate(rows["token_id"].tolist())}
    gathered = ShuffledStream(store, ["a", "token_id", "b"], **ORDER)
    staged = StagedStream(store, ["a", "token_id", "b"], **ORDER)
    for _ in range(15):
        batch, blocks = gathered.next().arrays, staged.next()
        picks = [where[token] for token in batch["token_id"].tolist()]
        for name in ARRAYS:
            np.testing.assert_array_equal(batch[name], rows[name][picks])
            parts = [
                [part.block.arrays[stored][part.picks] for stored in (name, name + PEAK)]
                for part in blocks.parts
            ]
            out = np.empty_like(batch[name])
            row_codec = store.row_codec(name)
            assert isinstance(row_codec, HalfRows)
            row_codec.decode([np.concatenate(part) for part in zip(*parts, strict=True)], out)
            np.testing.assert_array_equal(out, batch[name])
    gathered.close()
    staged.close()


@pytest.mark.usefixtures("toy")
def test_chunks_and_metadata_are_those_of_the_toy(tmp_path: Path) -> None:
    path = tmp_path / "s"
    write_store(path, ROWS, **OPTIONS)
    for name, itemsize in (("a", 2), ("a" + PEAK, 4), ("token_id", None)):
        document = json.loads((path / name / "zarr.json").read_text())
        inner = document["codecs"][0]["configuration"]["codecs"]
        packing = {"name": "masked", "configuration": {"typesize": itemsize, "mask": 90}}
        assert (packing in inner) == (itemsize is not None)
    attributes = json.loads((path / "a" / "zarr.json").read_text())["attributes"]
    assert attributes["peak"] == "a.peak" and len(attributes["mean"]) == 6
    header = open_store(path).header
    assert list(header.disk_arrays) == [
        *("a", "b", "token_id", "document", "position", "a.peak", "b.peak")
    ]
    first = (path / "a" / "c.0.0").read_bytes()
    assert first[0] == 88
    stored = np.frombuffer(first[1:13], np.uint8) ^ 90  # the six numbers of row 0
    rows, _ = item_columns(0, 16, ARRAYS)
    mean = calibration(ARRAYS)["a"].mean.astype(np.float32)
    centred = rows["a"][0].astype(DTYPES["bfloat16"]).astype(np.float32) - mean
    wanted = (centred / np.abs(centred).max()).astype("<f2")
    np.testing.assert_array_equal(stored.view("<f2"), wanted)


@pytest.mark.usefixtures("toy")
def test_an_item_of_a_killed_writer_is_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "s"
    writer = write_store(path, ROWS[:3], finalise=False, **OPTIONS)

    def die(*_: object) -> bool:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(commit_log, "append", die)
        writer.write_item(3, *item_columns(3, 16, ARRAYS))
    left = path / ("a" + PEAK) / "c.3"
    assert left.exists() and open_store(path).n_items == 3 and verify_store(path) == []
    assert str(left.relative_to(path)) in repair_store(path).dropped and not left.exists()
    again = StoreWriter(path)
    for item in (3, 4):
        again.write_item(item, *item_columns(item, ROWS[item], ARRAYS))
    again.finalise()
    write_store(tmp_path / "other", ROWS, **OPTIONS)
    shards = [
        {name: data for name, data in tree(store).items() if "/c." in name}
        for store in (path, tmp_path / "other")
    ]
    assert shards[0] == shards[1] and verify_store(path) == []


@pytest.mark.usefixtures("toy")
@pytest.mark.parametrize("file", ["a/c.3.0", "a.peak/c.3"])
def test_damage_is_noticed_and_repaired(tmp_path: Path, file: str) -> None:
    path = tmp_path / "s"
    write_store(path, ROWS, **OPTIONS)
    good = tree(path)
    data = bytearray((path / file).read_bytes())
    data[2] ^= 1
    (path / file).write_bytes(data)
    (path / "b.peak" / "zarr.json").unlink()
    damages = {damage.file: damage.chunk for damage in verify_store(path)}
    assert damages == {"zarr.json": None}, "the metadata of an array is missing"
    assert repair_store(path).redo == [3]
    assert not (path / file).exists() and verify_store(path) == []
    writer = StoreWriter(path)
    writer.write_item(3, *item_columns(3, 16, ARRAYS))
    writer.finalise()
    assert verify_store(path) == []
    assert {name: data for name, data in tree(path).items() if "/c." in name} == {
        name: data for name, data in good.items() if "/c." in name
    }


@pytest.mark.usefixtures("toy")
def test_a_damaged_chunk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "s"
    write_store(path, ROWS, **OPTIONS)
    good = (path / "a" / "c.0.0").read_bytes()
    for place in (0, 5):
        bad = bytearray(good)
        bad[place] ^= 1
        (path / "a" / "c.0.0").write_bytes(bad)
        (damage,) = verify_store(path)
        assert (damage.file, damage.item, damage.chunk) == ("a/c.0.0", 0, 0)
        with pytest.raises(DamagedDataError, match=r"c\.0\.0: chunk 0 fails its checksum"):
            open_store(path).read("a", 0, 16)
    (path / "a" / "c.0.0").write_bytes(good)

    def refuse(*_: object) -> None:
        raise ValueError("an unknown marker")

    monkeypatch.setattr(Masked, "decompress", refuse)
    with pytest.raises(DamagedDataError, match="chunk 0 does not decompress: an unknown marker"):
        open_store(path).read("a", 0, 16)


def test_a_store_of_an_unknown_codec_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with CODECS.registered("halves", Halves()):
        write_store(path, ROWS, **OPTIONS)
        store = open_store(path)
    message = (
        "codec='halves': expected one of: none, blosc, int8; install the package that provides "
        "this codec, with an entry point in the group latent_foundry.codecs"
    )
    for attempt in (
        lambda: open_store(path),
        lambda: StoreWriter(path),
        lambda: repair_store(path),
    ):
        with pytest.raises(UnknownCodecError, match=message):
            attempt()
    (damage,) = verify_store(path)
    assert damage.file == "zarr.json" and message in damage.problem
    assert store_exists(path) and len(store.read("a", 0, 16)) == 16  # what is open stays readable
    with pytest.raises(ConfigError, match=r"store\.codec='halves': expected one of: none, blosc"):
        StoreConfig(codec="halves").validate()
    with pytest.raises(ConfigError, match=r"^codec='halves': expected one of: none, blosc, int8$"):
        StoreWriter(tmp_path / "new", ARRAYS, codec="halves")


@pytest.mark.usefixtures("toy")
def test_what_the_toy_needs_is_checked(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"codec='halves': expected a calibration of \['a', 'b'\]"
    ):
        StoreWriter(tmp_path / "s", ARRAYS, codec="halves")
    taken = {"a": 4, "a.peak": 4}
    with pytest.raises(ConfigError, match=r"arrays='a\.peak': expected another name"):
        StoreWriter(tmp_path / "s", taken, codec="halves", calibration=calibration(taken))
    write_store(tmp_path / "plain", ROWS, arrays=taken)  # other codecs do not use this name
    with (
        CODECS.registered("small", Halves(Masked(most_chunk_bytes=100))),
        pytest.raises(ConfigError, match="at most 100 bytes, the limit of codec small"),
    ):
        StoreWriter(tmp_path / "s", **{**OPTIONS, "codec": "small", "shard_tokens": 16})
    assert not (tmp_path / "s").exists()


class WrongDtype(Halves):
    """Declares another data type than its rows have."""

    def disk_arrays(self, dtype: np.dtype[Any], width: int) -> dict[str, DiskArray]:
        parts = super().disk_arrays(dtype, width)
        return {**parts, "": DiskArray(np.dtype("<f4"), (width,))}


@pytest.mark.parametrize(
    ("codec", "message"),
    [
        (WrongDtype(), "codec broken encoded 16 rows of 'a' as .*float16.*: expected .*float32"),
        (Halves(Masked(grows=9)), "Masked compressed a chunk of 48 bytes to 58: expected 1 to 49"),
    ],
)
def test_a_codec_that_violates_the_interface_commits_nothing(
    tmp_path: Path, codec: Codec, message: str
) -> None:
    with CODECS.registered("broken", codec):
        writer = write_store(tmp_path / "s", [], finalise=False, **{**OPTIONS, "codec": "broken"})
        with pytest.raises(CodecError, match=message):
            writer.write_item(0, *item_columns(0, 16, ARRAYS))
        assert writer.committed_items() == set() and not list((tmp_path / "s").glob("*/c.*"))
