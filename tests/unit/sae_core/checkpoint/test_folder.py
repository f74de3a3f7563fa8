"""Test that damage of every kind to a checkpoint is named and an older one is used."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from sae_core.checkpoint.folder import (
    check_manifest,
    find_damage,
    hash_file,
    list_checkpoints,
    newest_valid,
    payload_files,
    prunable,
)
from sae_core.errors import DamagedCheckpointError

STATE = {
    "step": 1,
    "tokens": 2,
    "source_position": 1,
    "source_identity": "s",
    "seed": 0,
    "batch_tokens": 2,
    "d_model": 3,
    "saes": {},
    "mesh": {},
    "schema": 1,
}


def make(root: Path, step: int) -> Path:
    folder = root / f"step-{step:08d}"
    (folder / "weights").mkdir(parents=True)
    (folder / "weights" / "a.safetensors").write_bytes(bytes([step]) * 1000)
    (folder / "weights" / "c.safetensors").write_bytes(bytes([step + 100]) * 1000)
    (folder / "state.json").write_text(json.dumps(STATE | {"step": step}))
    entries = {
        name: {"bytes": (folder / name).stat().st_size, "sha256": hash_file(folder / name)}
        for name in payload_files(folder)
    }
    (folder / "manifest.json").write_text(json.dumps({"files": entries}))
    return folder


def flip(folder: Path) -> None:
    path = folder / "weights" / "a.safetensors"
    data = bytearray(path.read_bytes())
    data[500] ^= 1
    path.write_bytes(bytes(data))


def swap(folder: Path) -> None:
    a, c = (folder / "weights" / f"{name}.safetensors" for name in "ac")
    a.rename(folder / "b")
    c.rename(a)
    (folder / "b").rename(c)


def empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


DAMAGES: dict[str, Callable[[Path], object]] = {
    "flipped": flip,
    "truncated": lambda f: (f / "weights" / "a.safetensors").write_bytes(b"x"),
    "swapped": swap,
    "deleted": lambda f: (f / "weights" / "a.safetensors").unlink(),
    "extra": lambda f: (f / "weights" / "b.safetensors").write_bytes(b"x"),
    "no manifest": lambda f: (f / "manifest.json").unlink(),
    "manifest is not JSON": lambda f: (f / "manifest.json").write_text("{"),
    "manifest is a list": lambda f: (f / "manifest.json").write_text("[]"),
    "an entry is a number": lambda f: (f / "manifest.json").write_text('{"files": {"a": 1}}'),
    "state edited": lambda f: (f / "state.json").write_text(json.dumps(STATE | {"step": 99})),
    "empty folder": empty,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named_and_the_older_one_used(tmp_path, damage):
    older, newest = make(tmp_path, 1), make(tmp_path, 2)
    (tmp_path / "step-00000003.tmp").mkdir()  # an unfinished save
    assert newest_valid(tmp_path) == newest
    DAMAGES[damage](newest)
    with pytest.raises(DamagedCheckpointError, match="step-00000002"):
        check_manifest(newest)
    with pytest.warns(
        UserWarning, match="skipping a damaged or unreadable checkpoint.*step-00000002"
    ):
        assert newest_valid(tmp_path) == older


def test_every_damaged_file_is_named_and_ranks_share_the_check(tmp_path):
    folder = make(tmp_path, 1)
    swap(folder)
    (folder / "state.json").unlink()
    (folder / "weights" / "evil.pkl").write_bytes(b"x")
    problems = [f"{folder / name}: {what}" for name, what in (
        ("state.json", "missing"),
        ("weights/evil.pkl", "not in the manifest"),
        ("weights/a.safetensors", "SHA-256 differs from the manifest"),
        ("weights/c.safetensors", "SHA-256 differs from the manifest"),
    )]  # fmt: skip
    assert find_damage(folder) == problems
    shares = [find_damage(folder, share=(rank, 3)) for rank in range(3)]
    assert shares == [problems[:3], [*problems[:2], problems[3]], problems[:2]]
    assert find_damage(folder, hashes=False) == problems[:2]


def test_another_schema_is_refused(tmp_path):
    folder = make(tmp_path, 1)
    (folder / "state.json").write_text(json.dumps(STATE | {"schema": 9}))
    entries = {n: {"bytes": (folder / n).stat().st_size, "sha256": hash_file(folder / n)}
               for n in payload_files(folder)}  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps({"files": entries}))
    with pytest.warns(UserWarning, match="schema 9"):
        assert newest_valid(tmp_path) is None


def test_pruning_keeps_the_newest_valid_ones(tmp_path):
    folders = [make(tmp_path, step) for step in (1, 2, 3, 4)]
    DAMAGES["truncated"](folders[3])
    assert list_checkpoints(tmp_path)[0].name == "step-00000004"
    assert list(prunable(tmp_path, 2)) == [folders[0]]


def test_pruning_keeps_milestones_and_unpublished_folders(tmp_path):
    folders = {step: make(tmp_path, step) for step in (3, 9, 12, 17, 21, 26, 28)}
    DAMAGES["truncated"](folders[12])  # steps 10 to 19 keep their second checkpoint instead
    unpublished = tmp_path / "step-00000029.tmp"
    unpublished.mkdir()
    assert set(prunable(tmp_path, 2, 10)) == {folders[step] for step in (3, 9, 12)}
    assert set(prunable(tmp_path, 2)) == {folders[step] for step in (3, 9, 12, 17, 21)}
