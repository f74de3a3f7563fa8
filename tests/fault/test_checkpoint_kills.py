"""Test saves that are killed, fail on disk or are overtaken by training."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from sae_core.checkpoint.folder import list_checkpoints, newest_valid, step_of
from sae_core.checkpoint.row_ranges import read_tensors
from tests.support.ranks import CHECKPOINT_FAILED, Ranks
from tests.support.saving import EVERY, FAILURE_STEP, STEPS, TOKENS_PER_SAVE, Failure, train
from tests.support.trainer_ranks import BATCH

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

KILLED = -9


def run(folder: Path, n_ranks: int = 2, **more: object) -> tuple[list[int], list[str]]:
    ranks = Ranks(folder, n_ranks, _train, str(folder), more)
    return ranks.codes(), ranks.logs()


def _train(folder: str, more: dict[str, Any]) -> int:
    return train(folder, **more)


def saved(folder: Path, step: int) -> dict[str, torch.Tensor]:
    found = folder / "checkpoints" / f"step-{step:08d}"
    return read_tensors(found / "weights") | read_tensors(found / "optimizer")


def same(one: Path, other: Path, step: int = STEPS) -> None:
    a, b = saved(one, step), saved(other, step)
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert torch.equal(tensor, b[name]), (step, name)


@pytest.fixture(scope="module")
def clean(tmp_path_factory) -> Path:
    """Make an undisturbed run that waits for each of its saves."""
    folder = tmp_path_factory.mktemp("clean")
    assert run(folder, checkpoint={"asynchronous": False})[0] == [0, 0]
    return folder


@pytest.mark.parametrize(
    ("point", "left"),
    [("copy", 10), ("write", 10), ("manifest", 10), ("rename", 10), ("latest", 20)],
)
def test_a_kill_at_every_stage_of_a_save(clean, tmp_path, point, left):
    codes, logs = run(tmp_path, failure=Failure(point))
    assert codes[0] == KILLED and codes[1] not in (0, KILLED), logs
    newest = newest_valid(tmp_path / "checkpoints")
    assert newest is not None and step_of(newest) == left
    codes, logs = run(tmp_path)
    assert codes == [0, 0], logs
    assert f"resumed from step-{left:08d}" in logs[0]
    same(clean, tmp_path)


def test_a_kill_during_pruning_leaves_no_damaged_checkpoint(clean, tmp_path):
    codes, _ = run(tmp_path, 1, latent=1, failure=Failure("prune"))
    assert codes == [KILLED]
    root = tmp_path / "checkpoints"
    assert [path.name for path in root.glob("*.old.tmp")] == ["step-00000010.old.tmp"]
    assert all((folder / "manifest.json").exists() for folder in list_checkpoints(root))
    assert run(tmp_path, 1, latent=1)[0] == [0]
    assert not list(root.glob("*.tmp"))


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_rank_killed_during_a_save_ends_the_others(tmp_path, asynchronous):
    settings = {"asynchronous": asynchronous}  # when False, only the save can notice the death
    codes, logs = run(tmp_path, 4, failure=Failure("write", rank=1), checkpoint=settings)
    assert codes[1] == KILLED
    assert all(code not in (0, KILLED) for code in codes[:1] + codes[2:]), logs
    assert [step_of(folder) for folder in list_checkpoints(tmp_path / "checkpoints")] == [10]


@pytest.mark.parametrize("failure", [Failure("disk", "raise", rank=1), Failure("no room", rank=1)])
def test_a_rank_that_cannot_write_fails_all_ranks(tmp_path, failure):
    codes, logs = run(tmp_path, failure=failure, step_s=0.02)
    assert codes == [CHECKPOINT_FAILED] * 2, logs
    for log in logs:
        assert f"cannot write {tmp_path}/checkpoints/step-{FAILURE_STEP:08d}.tmp: rank 1" in log
    assert [step_of(folder) for folder in list_checkpoints(tmp_path / "checkpoints")] == [10]


def test_a_failed_save_ends_training_long_before_the_next_one(tmp_path):
    every = {"every_tokens": FAILURE_STEP * BATCH}
    codes, logs = run(
        tmp_path, failure=Failure("disk", "raise", rank=1), step_s=0.4, checkpoint=every
    )
    assert codes == [CHECKPOINT_FAILED] * 2, logs
    ends = [int(re.findall(r"ended at step (\d+)", log)[0]) for log in logs]
    assert ends[0] == ends[1] and FAILURE_STEP <= ends[0] < STEPS, ends


def test_a_file_in_place_of_the_checkpoint_folder(tmp_path):
    root = tmp_path / "checkpoints"
    root.mkdir()
    (root / f"step-{EVERY:08d}.tmp").write_text("not a folder")
    codes, logs = run(tmp_path)
    assert codes == [CHECKPOINT_FAILED] * 2, logs
    assert all("cannot prepare" in log and "rank 0: NotADirectoryError" in log for log in logs)
    assert list_checkpoints(root) == []


@pytest.mark.parametrize(("latent", "zero"), [(1, 1), (2, 0)])
def test_a_save_that_training_overtakes_holds_its_own_step(tmp_path, latent, zero):
    more = {"latent": latent, "zero": zero, "failure": Failure("begin", "wait")}
    for name, asynchronous in (("now", False), ("later", True)):
        settings = {"asynchronous": asynchronous, "keep": 9}
        codes, logs = run(tmp_path / name, checkpoint=settings, **more)
        assert codes == [0, 0], logs
    for step in range(EVERY, STEPS + 1, EVERY):
        same(tmp_path / "now", tmp_path / "later", step)


@pytest.mark.parametrize(("latent", "zero"), [(1, 1), (2, 0)])
def test_a_save_without_room_for_a_copy_holds_its_own_step(tmp_path, latent, zero):
    more = {"latent": latent, "zero": zero, "failure": Failure("begin", "wait")}
    for name, settings in (
        ("now", {"checkpoint": {"asynchronous": False, "keep": 9}}),
        ("short", {"checkpoint": {"keep": 9}, "short_of_memory": True}),
    ):
        codes, logs = run(tmp_path / name, **settings, **more)
        assert codes == [0, 0], logs
    assert "not saved fully in the background" in logs[0] and "0.00 GiB" in logs[0]
    waits = re.search(r"'checkpoint_memory_wait_s': ([\d.]+)", logs[0])
    assert waits is not None and float(waits[1]) > 0.9, logs[0]
    for step in range(EVERY, STEPS + 1, EVERY):
        same(tmp_path / "now", tmp_path / "short", step)


@pytest.mark.parametrize("asynchronous", [True, False])
def test_training_does_not_wait_for_blocks_of_a_save_that_failed(tmp_path, asynchronous):
    codes, logs = run(
        tmp_path,
        failure=Failure("disk", "raise", rank=1),
        step_s=0.02,
        checkpoint={"asynchronous": asynchronous},
        short_of_memory=True,
    )
    assert codes == [CHECKPOINT_FAILED] * 2, logs


def test_milestones_are_kept_and_saves_also_follow_the_clock(tmp_path):
    settings = {
        "every_tokens": 10**9,
        "every_minutes": 1e-9,  # due whenever the ranks synchronise, every few steps
        "keep_every_tokens": TOKENS_PER_SAVE,
    }
    codes, logs = run(tmp_path, step_s=0.15, checkpoint=settings)
    assert codes == [0, 0], logs
    steps = sorted(step_of(folder) for folder in list_checkpoints(tmp_path / "checkpoints"))
    found = re.search(r"'checkpoints': (\d+), 'checkpoint_pause_s': ([\d.]+)", logs[0])
    assert found is not None
    assert int(found[1]) > len(steps) > 3 and float(found[2]) > 0
    milestones = {step // EVERY for step in steps}
    assert milestones >= {1, 2, 3, 4}
