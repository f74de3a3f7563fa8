"""Test trainers in lockstep on one stream: one trainer's state does not affect the others."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from sae_core.checkpoint.folder import newest_valid, step_of
from sae_core.distributed.mesh import Mesh
from sae_core.errors import DivergedError
from sae_core.training.lockstep import train_in_lockstep
from sae_core.training.shared_source import SharedSource
from sae_core.training.trainer import Report, Trainer
from tests.support.ranks import Ranks
from tests.support.trainer_ranks import Job, SyntheticSource, config_of

pytestmark = pytest.mark.distributed

STEPS, EVERY, WRITING_S = 20, 10, 2.0


def make_trainers(folder: Path, steps: list[int], every: int, reports: list[Report]) -> Any:
    """Yield calibrated trainers on one stream, in the folders 0, 1, ... of `folder`."""
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    mesh = Mesh.create("cpu", 1, 1)
    shared_source = SharedSource(SyntheticSource(0, 1), torch.device("cpu"))
    for index, (n_steps, report) in enumerate(zip(steps, reports, strict=True)):
        root = folder / str(index) / "checkpoints"
        root.mkdir(parents=True)
        config = config_of(Job(str(root.parent), steps=n_steps, save_every=every))
        trainer = Trainer(config, mesh, shared_source.view(), root, 3, report, 1)
        trainer.calibrate()
        yield trainer


def ignore(row: dict[str, Any]) -> None:
    """Discard a report."""


@pytest.mark.parametrize(("at", "n_steps"), [(STEPS, STEPS), (STEPS + 2, STEPS + 5)])
def test_an_idle_trainer_does_not_make_the_others_save(
    tmp_path: Path, at: int, n_steps: int
) -> None:
    """The idle trainer has finished or waits for the stream; its last save began an hour ago."""
    rank = Ranks(tmp_path / "ranks", 1, _train_beside_an_idle_one, str(tmp_path), at, n_steps)
    assert rank.codes() == [0], rank.logs()
    assert "saves 1\n" in rank.logs()[0], "expected only the checkpoint of the last step"


def _train_beside_an_idle_one(folder: str, at: int, n_steps: int) -> int:
    stepping, idle = make_trainers(Path(folder), [STEPS, n_steps], 1000, [ignore, ignore])
    idle.step = at
    idle.source.seek(at)
    idle.saver.last_began -= 3600
    assert idle.save_overdue and not stepping.save_overdue
    train_in_lockstep([stepping, idle])
    print(f"saves {stepping.saver.saves}")
    return 0


def test_the_last_save_of_a_diverged_trainer_is_completed(tmp_path: Path) -> None:
    rank = Ranks(tmp_path / "ranks", 1, _train_beside_a_diverging_one, str(tmp_path))
    assert rank.codes() == [0], rank.logs()
    assert "[False, True] diverged\n" in rank.logs()[0], rank.logs()
    newest = newest_valid(tmp_path / "0" / "checkpoints")
    assert newest is not None and step_of(newest) == EVERY


def _train_beside_a_diverging_one(folder: str) -> int:
    """Train two; the first diverges one step after its save began, while a slow disk writes it."""
    from sae_core.checkpoint import save

    real = save._hash_share

    def slow(temporary: Path, names: list[str]) -> object:
        if temporary.parents[1].name == "0":
            time.sleep(WRITING_S)
        return real(temporary, names)

    def judge(row: dict[str, Any]) -> None:
        if row["step"] > EVERY:
            raise DivergedError("diverged")

    save._hash_share = slow  # type: ignore[assignment]
    trainers = list(make_trainers(Path(folder), [STEPS, STEPS], EVERY, [judge, ignore]))
    outcomes = train_in_lockstep(trainers)
    print([outcome.finished for outcome in outcomes], outcomes[0].error)
    return 0
