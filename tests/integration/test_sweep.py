"""Test the sweep stage: finished cells are skipped, failed cells are reported and retried."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from analysis.scaling_laws.cells import read_sweep
from cluster.run_folder.sweep_record import write_record
from sae_core.checkpoint.folder import list_checkpoints, step_of
from sae_core.errors import DivergedError
from tests.support.paths import ROOT
from tests.support.single_rank import BATCH, STEPS, make_store

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def launch(folder: Path, *more: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        str(ROOT / "launch.py"),
        "experiment=none",
        "stage=sweep",
        "name=grid",
        f"runs_dir={folder}",
        f"store.path={folder / 'store'}",
        "store.window_items=2",
        "store.buffer_tokens=512",
        "sae.auxk=8",
        "sae.dead_after_tokens=1000",
        f"train.batch_tokens={BATCH}",
        f"train.tokens={STEPS * BATCH}",
        "train.sample_tokens=500",
        "train.threads_per_rank=1",
        "logging.wandb=disabled",
        "logging.every_steps=5",
        "sweep.n_latents=[40,60]",
        "sweep.saes_per_process=2",
        *more,
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_a_sweep_that_grows(tmp_path: Path) -> None:
    make_store(tmp_path / "store")
    bad = "sweep.overrides=['n60-k8:optim.lr=1e30']"
    first = launch(tmp_path, "sweep.k=[4,8]", bad)
    assert first.returncode == 1, first.stdout + first.stderr
    assert "4 cells, 0 of them finished or stopped before, 2 passes over the store" in first.stdout
    assert "sweep: n60-k8 failed: acts: loss" in first.stdout and "is not finite" in first.stdout
    assert first.stderr.endswith("rerun the command to try them again\n")
    assert "error: 1 of 4 cells failed: n60-k8" in first.stderr
    grid = tmp_path / "grid"
    record = json.loads((grid / "n60-k8" / "sweep.json").read_text())
    assert record["state"] == "failed"
    ends = {}
    for name in ("n40-k4", "n40-k8", "n60-k4"):
        newest = list_checkpoints(grid / name / "checkpoints")[0]
        assert step_of(newest) == STEPS
        ends[name] = newest.stat().st_mtime_ns
        assert (grid / name / "train.json").exists() and (grid / name / "env.json").exists()

    changed = launch(tmp_path, "sweep.k=[4,8]")
    assert changed.returncode == 2 and "optim.lr: 1e+30 -> None" in changed.stderr

    more = launch(tmp_path, "sweep.k=[4,8,6]", bad)
    assert more.returncode == 1, more.stdout + more.stderr
    assert "6 cells, 3 of them finished or stopped before, 2 passes over the store" in more.stdout
    for name in ("n40-k6", "n60-k6"):
        assert step_of(list_checkpoints(grid / name / "checkpoints")[0]) == STEPS
    for name, before in ends.items():
        assert list_checkpoints(grid / name / "checkpoints")[0].stat().st_mtime_ns == before


def test_a_diverged_cell_counts_again_once_it_is_trained_alone(tmp_path: Path) -> None:
    make_store(tmp_path / "store")
    grid = tmp_path / "grid"
    (grid / "n40-k4").mkdir(parents=True)
    write_record(grid / "n40-k4", DivergedError("FVU 7"))  # as a sweep leaves it
    cell = ("stage=train", f"runs_dir={grid}", "name=n40-k4", "sae.n_latents=40", "sae.k=4")
    alone = launch(tmp_path, *cell)
    assert alone.returncode == 0, alone.stdout + alone.stderr
    assert [one.name for one in read_sweep(str(grid), "fvu").cells] == ["n40-k4"]
