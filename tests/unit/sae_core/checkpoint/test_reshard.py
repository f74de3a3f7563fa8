"""Test that resharding keeps a checkpoint's content and needs little memory."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from safetensors.torch import load_file
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from benchmarks.export_memory import measure
from benchmarks.harness.synthetic_checkpoint import NAME, make_checkpoint
from foundation.errors import ConfigError
from sae_core import load_sae
from sae_core.checkpoint.folder import check_manifest, newest_valid
from sae_core.checkpoint.reshard import reshard_checkpoint
from sae_core.checkpoint.row_ranges import read_layout, read_tensors
from sae_core.checkpoint.safetensors_file import TensorFileWriter
from sae_core.checkpoint.verify import checkpoint_problems
from sae_core.errors import CheckpointError

L, D = 37, 6


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "run" / "checkpoints", L, D)


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def same(one: Path, other: Path) -> None:
    for part in ("weights", "optimizer"):
        a, b = read_tensors(one / part), read_tensors(other / part)
        assert a.keys() == b.keys() and len(a) in (7, 8)
        assert all(torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a)
    assert (one / "state.json").read_bytes() == (other / "state.json").read_bytes()


@pytest.mark.parametrize("n_shards", [1, 2, 5, L])
def test_content_and_source_are_unchanged(source: Path, tmp_path: Path, n_shards: int):
    before = contents(source)
    target = reshard_checkpoint(source, tmp_path / "to", n_shards)
    assert contents(source) == before
    check_manifest(target)
    assert checkpoint_problems(target) == []
    same(source, target)
    for part in ("weights", "optimizer"):
        assert len(list((target / part).glob("*.safetensors"))) == n_shards
    pieces = read_layout(target / "weights")[f"{NAME}.W_enc"].pieces
    rows = [piece.stop_row - piece.first_row for piece in pieces]
    assert max(rows) - min(rows) <= 1
    same(source, reshard_checkpoint(target, tmp_path / "back", 2))
    one, other = load_sae(source), load_sae(target)
    assert torch.equal(one(torch.ones(2, D)), other(torch.ones(2, D)))


def test_torch_reads_the_files(source: Path, tmp_path: Path):
    target = reshard_checkpoint(source, tmp_path / "to", 3)
    reader = dcp.HuggingFaceStorageReader(str(target / "weights"))
    metadata = reader.read_metadata().state_dict_metadata
    read = {}
    for name, entry in metadata.items():
        assert isinstance(entry, TensorStorageMetadata)
        read[name] = torch.empty(entry.size, dtype=entry.properties.dtype)
    dcp.load(read, storage_reader=reader, no_dist=True)
    expected = read_tensors(source / "weights")
    assert read.keys() == expected.keys()
    assert all(torch.equal(read[name], expected[name]) for name in expected)


def test_invalid_targets_are_refused(source: Path, tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"exists.*reshard.to"):
        reshard_checkpoint(source, source.parent, 1)
    with pytest.raises(ConfigError, match=r"reshard\.shards=38: expected at most 37"):
        reshard_checkpoint(source, tmp_path / "to", L + 1)
    assert not (tmp_path / "to").exists()


def test_an_interrupted_reshard_leaves_no_checkpoint(source: Path, tmp_path: Path, monkeypatch):
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("os.rename", killed)
        reshard_checkpoint(source, tmp_path / "to", 2)
    assert newest_valid(tmp_path / "to") is None
    assert [path.name for path in (tmp_path / "to").iterdir()] == ["reshard-step-00000007.tmp"]
    same(source, reshard_checkpoint(source, tmp_path / "to", 3))
    assert [path.name for path in (tmp_path / "to").iterdir()] == ["step-00000007"]


def test_files_are_readable_by_safetensors(tmp_path: Path):
    rows, path = torch.randn(5, 3), tmp_path / "a.safetensors"
    shapes = {
        "plain": (torch.bfloat16, (5, 3)),
        "turned": (torch.float32, (3, 5)),
        "scalar": (torch.int64, ()),
        "none": (torch.float32, (0, 3)),
    }
    with TensorFileWriter(path, shapes, {"a": "b"}) as file:
        for first in (3, 0):  # in any order
            file.write_rows("plain", first, rows[first : first + 3])
            file.write_columns("turned", first, rows[first : first + 3])
        file.write_rows("scalar", 0, torch.tensor(7))
    read = load_file(path)
    assert torch.equal(read["plain"], rows.bfloat16()) and torch.equal(read["turned"], rows.T)
    assert read["scalar"] == 7 and read["none"].shape == (0, 3)
    with safe_open(path, "pt") as opened:
        assert opened.metadata() == {"format": "pt", "a": "b"}
    with pytest.raises(FileExistsError):
        TensorFileWriter(path, shapes)


@pytest.mark.slow
def test_a_large_checkpoint_is_copied_in_little_memory(tmp_path: Path):
    if shutil.disk_usage(tmp_path).free < 4 << 30 or not os.path.exists("/proc/self/status"):
        pytest.skip("needs 4 GiB of free disk and /proc/self/status")

    def peak(run_dir: Path, n_latents: int) -> int:
        make_checkpoint(run_dir / "checkpoints", n_latents, 2048, empty=True)
        return measure(run_dir, "export", "reshard")[0]

    # Mapped pages of the files count as resident, more of them on a busy machine: measure twice.
    peaks = {
        n_latents: min(peak(tmp_path / f"{n_latents}-{i}", n_latents) for i in range(2))
        for n_latents in (16, 12_800)
    }
    files = (tmp_path / "12800-0" / "checkpoints").rglob("*.safetensors")
    assert sum(file.stat().st_size for file in files) > 600e6
    assert peaks[12_800] - peaks[16] < 100 << 20, peaks
