"""Common parts of the soak's episodes: a tiny run, and the comparison with a clean run."""

from __future__ import annotations

import random
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from activation_store import Store, open_store, verify_store
from sae_core.checkpoint.folder import OPTIMIZER, WEIGHTS, list_checkpoints, step_of
from sae_core.checkpoint.row_ranges import read_tensors
from tests.fault.test_concurrent import command as pipeline_command
from tests.fault.test_concurrent import run
from tests.support.damage import DAMAGES, damage_some
from tests.support.injection import last_step
from tests.support.tiny_models import save_gpt2, write_text

STEPS, SAVE_EVERY = 560, 40
HANG_S = 8
SETTINGS = (
    "sae.n_latents=256",
    "parallel.latent=2",
    "train.batch_tokens=16",
    f"train.hang_timeout_s={HANG_S}",
    "checkpoint.timeout_s=20",  # for ranks that are frozen during a save
    "train.timeout_s=120",
    f"checkpoint.every_tokens={16 * SAVE_EVERY}",
    "checkpoint.keep=3",
)
_SIDECARS = ("token_id", "document", "position")


@dataclass(frozen=True)
class Fault:
    """One fault that took effect."""

    kind: str
    what: str
    """Process, file or signal."""
    at_step: int
    """Last training step that the run had reported."""


@dataclass
class Episode:
    """One run and its faults."""

    folder: Path
    random: random.Random
    """Source of all random choices."""
    faults: list[Fault] = field(default_factory=list)
    missed: Counter[str] = field(default_factory=Counter)
    """Number of faults, by kind, that had no effect: the run or its target had already ended."""

    @property
    def run_dir(self) -> Path:
        """The run's folder."""
        return self.folder / "run"

    def happened(self, kind: str, what: str) -> None:
        """Record a fault."""
        self.faults.append(Fault(kind, what, last_step(self.run_dir)))


@dataclass(frozen=True)
class Verdict:
    """The end of an episode, compared with the clean run."""

    rows_lost: int
    rows_doubled: int
    store_equal: bool
    """Every row of every array is equal, in order, and `verify_store` finds no damage."""
    weights_equal: bool
    """Weights, moments and ages after the last step are equal bit for bit."""

    @property
    def good(self) -> bool:
        """True if the run ended exactly as the clean run did."""
        return not (self.rows_lost or self.rows_doubled) and self.store_equal and self.weights_equal


class Clean:
    """The clean run, without faults: first it harvests, then it trains.

    Args:
        work: Folder for the run, its model and its text.
    """

    def __init__(self, work: Path) -> None:
        self.work = work
        save_gpt2(work / "model")
        write_text(work / "text.txt", documents=700)
        for stage in ("harvest", "train"):
            run(work, "clean", *SETTINGS, f"stage={stage}")
        self.run_dir = work / "clean" / "run"
        self.store = self.run_dir / "store"
        self._rows = read_rows(open_store(self.store))
        self._weights = final_tensors(self.run_dir)

    def command(self, folder: Path, *more: str) -> list[str]:
        """Return the command line of a run in `folder`."""
        return pipeline_command(self.work, folder.name, *SETTINGS, *more)

    def judge(self, run_dir: Path, store: str | Path) -> Verdict:
        """Compare a finished run with the clean run."""
        rows = read_rows(open_store(store))
        expected = self._rows
        keys = _keys(rows)
        wanted = _keys(expected)
        equal = rows.keys() == expected.keys() and all(
            np.array_equal(rows[name], expected[name]) for name in rows
        )
        weights = final_tensors(run_dir)
        return Verdict(
            rows_lost=(wanted - keys).total(),
            rows_doubled=sum(n - 1 for n in keys.values()),
            store_equal=equal and verify_store(store) == [],
            weights_equal=weights.keys() == self._weights.keys()
            and all(torch.equal(weights[name], self._weights[name]) for name in weights),
        )


def read_rows(store: Store) -> dict[str, Any]:
    """Read every column of a store."""
    names = (*store.arrays, *_SIDECARS)
    return {name: store.read(name, 0, store.n_tokens) for name in names}


def _keys(rows: dict[str, Any]) -> Counter[tuple[int, int]]:
    """Count how often each token of the text occurs, by (document, position)."""
    pairs = zip(rows["document"].tolist(), rows["position"].tolist(), strict=True)
    return Counter(pairs)


def final_tensors(run_dir: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of the checkpoint after the last step; {} if there is none."""
    found = list_checkpoints(run_dir / "checkpoints")
    if not found or step_of(found[0]) != STEPS:
        return {}
    return read_tensors(found[0] / WEIGHTS) | read_tensors(found[0] / OPTIMIZER)


def damage_checkpoints(episode: Episode, most: int) -> list[str]:
    """Damage up to `most` of the newest checkpoints, each in one way; return their names."""
    damaged = []
    count = episode.random.randint(0, most)
    for folder in list_checkpoints(episode.run_dir / "checkpoints")[:count]:
        files = sorted(folder.rglob("*.*"))
        how = episode.random.choice([*DAMAGES, "swap"])
        if how == "flip":  # a flipped bit of the manifest may be in a part that is not used
            files = [file for file in files if file.name != "manifest.json"]
        found = damage_some(files, how, episode.random)
        if found:
            damaged.append(folder.name)
            names = ", ".join(f"{folder.name}/{file.relative_to(folder)}" for file in found)
            episode.happened(f"checkpoint: {how}", names)
    return damaged


def assert_named(damaged: list[str], log: str) -> None:
    """Check that the log of a start names each damaged checkpoint that it skipped."""
    for name in damaged:
        assert re.search(f"skipping a damaged or unreadable checkpoint: .*{name}", log), (
            f"{name}: {log}"
        )
