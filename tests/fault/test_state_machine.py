"""Save, kill, damage, prune, reshard and resume on any mesh in random order; check what loads."""

from __future__ import annotations

import os
import random
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from sae_core.checkpoint.folder import checkpoint_name, list_checkpoints, newest_valid, step_of
from sae_core.checkpoint.reshard import reshard_checkpoint
from sae_core.checkpoint.row_ranges import read_tensors
from tests.support.damage import DAMAGES, damage_some
from tests.support.ranks import Ranks
from tests.support.saving import Failure, install_failure
from tests.support.trainer_ranks import Job, SyntheticSource, config_of

pytestmark = [pytest.mark.slow, pytest.mark.distributed, pytest.mark.timeout(900)]

MESHES = ((1, 1, 0), (2, 1, 0), (1, 2, 1))
"""Latent shards, data replicas, ZeRO stage."""
POINTS = ("copy", "write", "manifest", "rename", "latest", "prune")
PATIENCE_S = 200
Tensors = dict[str, torch.Tensor]


class Group:
    """Long-lived trainer ranks of one mesh that execute one command at a time."""

    def __init__(self, folder: Path, mesh: tuple[int, int, int]) -> None:
        self._folder = folder
        self._mesh = mesh
        self._starts = 0
        self._ranks: Ranks | None = None
        self._pipes: list[Connection] = []

    def __call__(self, *command: Any) -> Any:
        """Return rank 0's answer, or None if the command killed a rank and so ended the group."""
        ranks = self._ranks or self._start()
        try:
            for pipe in self._pipes:
                pipe.send(command)
            for pipe in self._pipes:
                assert pipe.poll(PATIENCE_S), f"a hang in {command}"
            answers = [pipe.recv() for pipe in self._pipes]
            return answers[0]
        except (EOFError, OSError):
            logs = ranks.logs()
            self.end()
            assert command[0] == "save" and command[-1], (command, logs)
            return None

    def _start(self) -> Ranks:
        latent, data, _ = self._mesh
        ours, theirs = zip(*(Pipe() for _ in range(latent * data)), strict=True)
        folder = self._folder / f"{self._mesh}-{self._starts}"
        self._ranks = Ranks(folder, latent * data, _serve, theirs, str(folder), self._mesh)
        self._pipes = list(ours)
        self._starts += 1
        for end in theirs:
            end.close()
        return self._ranks

    def end(self) -> None:
        """Stop the ranks if they still run."""
        for pipe in self._pipes:
            pipe.close()
        if self._ranks is not None:
            self._ranks.codes()
        self._ranks = None


def _serve(pipes: tuple[Connection, ...], folder: str, mesh: tuple[int, int, int]) -> int:
    pipe = pipes[int(os.environ["RANK"])]
    for other in pipes:
        if other is not pipe:
            other.close()
    rank = _Rank(folder, *mesh)
    while True:
        try:
            name, *arguments = pipe.recv()
        except EOFError:
            return 0
        pipe.send(getattr(rank, name)(*arguments))


class _Rank:
    """The commands as one rank executes them; each is collective."""

    def __init__(self, folder: str, latent: int, data: int, zero: int) -> None:
        import torch.distributed as dist

        from sae_core.distributed.mesh import Mesh
        from sae_core.training.trainer import Trainer

        torch.set_num_threads(1)
        dist.init_process_group("gloo")
        self.config = config_of(Job(folder, latent, data, zero))
        self.config.checkpoint.asynchronous = False
        mesh = Mesh.create("cpu", latent, data)
        source = SyntheticSource(mesh.data_rank, data)
        self.trainer = Trainer(self.config, mesh, source, Path(folder), 3, lambda row: None, 1)
        self.trainer.calibrate()

    def resume(self, root: Path, snapshot: Path) -> tuple[str | None, list[str]]:
        """Resume, save the state to `snapshot`; return the checkpoint's name and the warnings."""
        from sae_core.checkpoint import agreed_checkpoint

        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            newest = agreed_checkpoint(root)
        if newest is None:
            self.trainer.step = 0
            self.trainer.source.seek(0)
        else:
            self.trainer.resume(newest)
            self.save(snapshot, 1, None)
        return newest.name if newest else None, [str(warning.message) for warning in caught]

    def train(self, steps: int, snapshot: Path) -> int:
        """Train, save the state to `snapshot`, and return the step."""
        for _ in range(steps):
            self.trainer.engine.train_step(self.trainer.source.next().x, self.trainer.step)
            self.trainer.step += 1
        self.save(snapshot, 1, None)
        return self.trainer.step

    def save(self, root: Path, keep: int, point: str | None) -> bool:
        """Save and prune; rank 0 is killed at `point` unless that is None."""
        import torch.distributed as dist

        from sae_core.checkpoint.background_saver import CheckpointSaver

        root.mkdir(exist_ok=True)
        if point and dist.get_rank() == 0:
            install_failure(Failure(point, step=self.trainer.step))
        self.config.checkpoint.keep = keep
        self.trainer.saver = CheckpointSaver(
            root, self.config.checkpoint, self.trainer.mesh, torch.device("cpu"), 1
        )
        self.trainer.save()
        return True


@dataclass
class Saved:
    """The expected content of a step's checkpoint on disk."""

    tensors: Tensors | None
    """Tensors by name; None if the checkpoint is damaged."""
    sizes: dict[str, int]
    """Bytes of each file as written; pruning checks nothing else."""


class Checkpoints(RuleBasedStateMachine):
    """A folder of checkpoints, compared with a model of its expected content."""

    groups: dict[tuple[int, int, int], Group]
    folder: Path

    def __init__(self) -> None:
        super().__init__()
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        self.root = self.folder / "checkpoints"
        self.snapshot = self.folder / "snapshot"
        self.root.mkdir()
        self.expected: dict[int, Saved] = {}

    @property
    def newest(self) -> int | None:
        """The step of the newest valid checkpoint, or None."""
        return max((step for step, saved in self.expected.items() if saved.tensors), default=None)

    @rule(
        mesh=st.sampled_from(MESHES),
        steps=st.integers(1, 3),
        keep=st.integers(1, 3),
        point=st.none() | st.sampled_from(POINTS),
    )
    def resume_train_save(
        self, mesh: tuple[int, int, int], steps: int, keep: int, point: str | None
    ) -> None:
        group, newest = self.groups[mesh], self.newest
        name, warned = group("resume", self.root, self.snapshot)
        assert name == (None if newest is None else checkpoint_name(newest))
        for step in self.expected:
            if newest is None or step > newest:
                assert any(checkpoint_name(step) in text for text in warned), f"{step} is not named"
        if newest is not None:
            assert_equal(self._take_snapshot(newest), self.expected[newest].tensors)
        step = group("train", steps, self.snapshot)
        trained = self._take_snapshot(step)
        left_over = any(self.root.glob("*.old.tmp"))  # the next save clears these first
        if group("save", self.root, keep, point):
            self._published(step, trained)
            self._prune(keep)
            if point:  # nothing was pruned, so the kill is still pending
                group.end()
        elif point == "latest" or (point == "prune" and not left_over):
            self._published(step, trained)
            self._prune(keep, most=1 if point == "prune" else 0)
        elif point == "rename":
            self.expected.pop(step, None)  # a damaged checkpoint of that step was removed first

    @precondition(lambda self: self.expected)
    @rule(
        pick=st.integers(0, 9), how=st.sampled_from([*DAMAGES, "swap"]), seed=st.integers(0, 2**32)
    )
    def damage(self, pick: int, how: str, seed: int) -> None:
        step = sorted(self.expected)[-1 - pick % len(self.expected)]
        files = sorted((self.root / checkpoint_name(step)).rglob("*.*"))
        if how == "flip":  # parts of the manifest are not checked
            files = [file for file in files if file.name != "manifest.json"]
        if damage_some(files, how, random.Random(seed)):
            self.expected[step].tensors = None

    @precondition(lambda self: self.newest is not None)
    @rule(n_shards=st.sampled_from([1, 3, 7]), replace=st.booleans())
    def reshard(self, n_shards: int, replace: bool) -> None:
        newest = self.newest
        assert newest is not None
        source = self.root / checkpoint_name(newest)
        target = reshard_checkpoint(source, self.folder / "resharded", n_shards)
        assert_equal(contents(target), self.expected[newest].tensors)
        if replace:
            shutil.rmtree(source)
            target.rename(source)
            self.expected[newest].sizes = sizes(source)
        shutil.rmtree(self.folder / "resharded")

    @invariant()
    def the_newest_valid_one_is_found(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = newest_valid(self.root)
        assert (found and step_of(found)) == self.newest

    @invariant()
    def nothing_else_is_there_or_missing(self) -> None:
        assert [step_of(f) for f in list_checkpoints(self.root)] == sorted(self.expected)[::-1]

    def _take_snapshot(self, step: int) -> Tensors:
        found = contents(self.snapshot / checkpoint_name(step))
        shutil.rmtree(self.snapshot)
        return found

    def _published(self, step: int, tensors: Tensors) -> None:
        self.expected[step] = Saved(tensors, sizes(self.root / checkpoint_name(step)))

    def _prune(self, keep: int, most: int = 99) -> None:
        """Model pruning: keep the newest `keep` that look undamaged, and all between them."""
        whole = 0
        for step in sorted(self.expected, reverse=True):
            if whole == keep:
                if most > 0:
                    del self.expected[step]
                most -= 1
            elif sizes_now := sizes(self.root / checkpoint_name(step)):
                whole += sizes_now == self.expected[step].sizes


def contents(folder: Path) -> Tensors:
    return read_tensors(folder / "weights") | read_tensors(folder / "optimizer")


def sizes(folder: Path) -> dict[str, int]:
    return {str(file.relative_to(folder)): file.stat().st_size for file in folder.rglob("*.*")}


def assert_equal(found: Tensors, wanted: Tensors | None) -> None:
    assert wanted is not None and found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name


@pytest.fixture
def groups(tmp_path: Path) -> Iterator[dict[tuple[int, int, int], Group]]:
    made = {mesh: Group(tmp_path / "ranks", mesh) for mesh in MESHES}
    yield made
    for group in made.values():
        group.end()


@pytest.mark.parametrize("how", ["flip", "truncate"])
def test_a_damaged_newest_checkpoint_is_skipped(tmp_path, groups, how):
    """One fixed sequence of rules, whichever examples the machine draws below."""
    Checkpoints.groups, Checkpoints.folder = groups, tmp_path / "machine"
    machine = Checkpoints()
    for _ in range(2):
        machine.resume_train_save(MESHES[0], 1, 3, None)
    first, last = sorted(machine.expected)
    machine.damage(0, how, seed=0)
    assert machine.newest == first
    machine.the_newest_valid_one_is_found()
    machine.resume_train_save(MESHES[0], 1, 3, None)  # checks which one is resumed, and named
    assert machine.newest == last, "the damaged checkpoint was not replaced"
    machine.the_newest_valid_one_is_found()
    machine.nothing_else_is_there_or_missing()


def test_the_newest_valid_checkpoint_always_loads(tmp_path, groups):
    Checkpoints.groups, Checkpoints.folder = groups, tmp_path / "machine"
    run_state_machine_as_test(
        Checkpoints,
        settings=settings(
            max_examples=6,
            stateful_step_count=12,
            derandomize=True,
            database=None,
            deadline=None,
            phases=[Phase.generate],  # shrinking would start ranks a hundred times
            suppress_health_check=list(HealthCheck),
        ),
    )
