"""Test that cells trained in lockstep end with the same bits as cells trained alone."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
import torch

from analysis.scaling_laws.cells import read_sweep
from cluster.run_folder.saved_config import load_config, save_config
from cluster.run_folder.sweep_record import FAILED, STOPPED, read_record, write_record
from conf.schema.run import RunConfig
from conf.schema.sweep import SweepConfig
from conf.sweep_cells import cells_of
from foundation.errors import EXIT_PREEMPTED
from sae_core.checkpoint.folder import list_checkpoints, step_of
from sae_core.checkpoint.row_ranges import read_tensors
from sae_core.config import CheckpointConfig, OptimConfig, ParallelConfig, TopKConfig, TrainConfig
from sae_core.errors import DivergedError
from tests.support.ranks import Ranks, cluster_rank
from tests.support.single_rank import make_store

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

STEPS, EVERY, BATCH = 240, 80, 64
GRID = SweepConfig(
    n_latents=[60, 90],
    seed=[0, 1],
    overrides=[
        "n60-k4-seed1:optim.lr=0.004",
        f"n60-k4-seed1:train.tokens={100 * BATCH}",
        "n90-k4-seed1:sae.auxk=4",
    ],
)
LAGGARD = "n90-k4-seed0"
START_TIMEOUT_S, CELL_START_S = 6.0, 2.5
"""Start limit and start of one cell: all four cells of `GRID` together exceed the limit."""


def make_sweep(folder: Path, store: Path, grid: SweepConfig) -> list[str]:
    """Make the folders of a sweep and its cells as the driver does; return the cells' names."""
    config = RunConfig(
        name=folder.name,
        stage="sweep",
        runs_dir=str(folder.parent),
        sae=TopKConfig(n_latents=80, k=4, auxk=8, dead_after_tokens=1000),
        optim=OptimConfig(lr=2e-3),
        train=TrainConfig(STEPS * BATCH, BATCH, sample_tokens=500, threads_per_rank=1),
        parallel=ParallelConfig(latent=2),
        checkpoint=CheckpointConfig(every_tokens=EVERY * BATCH),
        sweep=grid,
    )
    config.store.path = str(store)
    config.store.window_items, config.store.buffer_tokens = 2, 512
    config.logging.wandb, config.logging.every_steps = "disabled", 5
    cells = cells_of(config, folder)
    for path, one in [(folder, config), *((folder / name, cells[name]) for name in cells)]:
        (path / "logs").mkdir(parents=True)
        save_config(one, path / "config.yaml")
    return list(cells)


def ranks(folder: Path, cells: list[str], trap: str = "") -> tuple[list[int], list[str]]:
    group = Ranks(folder / "ranks", 2, _rank, str(folder), cells, trap)
    return group.codes(), group.logs()


def _rank(folder: str, cells: list[str], trap: str) -> int:
    """Run `python -m cluster.rank`; rank 1 gets the signal `trap` during a save."""
    from cluster.training.store_source import StoreSource
    from sae_core.checkpoint import save
    from sae_core.training.trainer import Trainer

    real_hash, real_next, real_calibrate = save._hash_share, StoreSource.next, Trainer.calibrate

    def in_a_save(temporary: Path, names: list[str]) -> object:
        step = 2 * EVERY if trap == "SIGKILL" else EVERY
        here = os.environ["RANK"] == "1" and LAGGARD in str(temporary)
        if trap.startswith("SIG") and here and f"step-{step:08d}" in temporary.name:
            other = temporary.parents[2] / "n60-k4-seed0" / "checkpoints"
            while trap == "SIGKILL" and not (other / f"step-{step:08d}").exists():
                time.sleep(0.01)  # so that another cell is ahead when all resume
            os.kill(os.getpid(), getattr(signal, trap))
            time.sleep(1)
        return real_hash(temporary, names)

    def counted(source: StoreSource) -> object:
        print("a batch is read", flush=True)
        return real_next(source)

    def large(trainer: Trainer) -> None:
        time.sleep(CELL_START_S)
        real_calibrate(trainer)

    if trap == "large cells":
        Trainer.calibrate = large  # type: ignore[assignment, method-assign]
    save._hash_share = in_a_save  # type: ignore[assignment]
    StoreSource.next = counted  # type: ignore[assignment, method-assign]
    return cluster_rank(folder, *cells)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a store and train every cell alone on it, as an ordinary run."""
    folder = tmp_path_factory.mktemp("cohort")
    make_store(folder / "store")
    for name in make_sweep(folder / "alone", folder / "store", GRID):
        codes, logs = ranks(folder / "alone" / name, [])
        assert codes == [0, 0], logs
    return folder / "alone"


def state(run_dir: Path) -> dict[str, torch.Tensor]:
    newest = list_checkpoints(run_dir / "checkpoints")[0]
    tensors = read_tensors(newest / "weights") | read_tensors(newest / "optimizer")
    return tensors | {"step": torch.tensor(step_of(newest))}


def same_ends(one: Path, other: Path, names: list[str]) -> None:
    for name in names:
        a, b = state(one / name), state(other / name)
        assert a.keys() == b.keys()
        for key, tensor in a.items():
            assert torch.equal(tensor, b[key]), f"{name}: {key}"


def test_lockstep_training_gives_the_same_bits_from_one_read(alone: Path) -> None:
    mine = alone.parent / "together"
    names = make_sweep(mine, alone.parent / "store", GRID)
    codes, logs = ranks(mine, names)
    assert codes == [0, 0], logs
    same_ends(alone, mine, names)
    assert logs[0].count("a batch is read") == STEPS
    first = state(alone / names[0])
    assert any(not torch.equal(first[key], state(alone / names[1])[key]) for key in first)


def test_a_killed_rank_resumes_all_cells(alone: Path) -> None:
    mine = alone.parent / "killed"
    names = make_sweep(mine, alone.parent / "store", GRID)
    codes, logs = ranks(mine, names, "SIGKILL")
    assert codes[1] == -signal.SIGKILL and codes[0] != 0, logs
    steps = {name: step_of(list_checkpoints(mine / name / "checkpoints")[0]) for name in names}
    assert steps[LAGGARD] == EVERY < 2 * EVERY <= steps["n60-k4-seed0"], "no cell is ahead"
    codes, logs = ranks(mine, names)
    assert codes == [0, 0], logs
    same_ends(alone, mine, names)


def test_a_signal_saves_all_cells(alone: Path) -> None:
    mine = alone.parent / "preempted"
    names = make_sweep(mine, alone.parent / "store", GRID)
    codes, logs = ranks(mine, names, "SIGTERM")
    assert codes == [EXIT_PREEMPTED] * 2, logs
    steps = {name: step_of(list_checkpoints(mine / name / "checkpoints")[0]) for name in names}
    assert EVERY < steps[LAGGARD] < STEPS and steps[LAGGARD] == steps["n60-k4-seed0"]
    codes, logs = ranks(mine, names)
    assert codes == [0, 0], logs
    same_ends(alone, mine, names)


def test_a_slow_start_of_many_cells_does_not_count_as_a_hang(tmp_path: Path) -> None:
    make_store(tmp_path / "store")
    names = make_sweep(tmp_path / "large", tmp_path / "store", GRID)
    assert len(names) * CELL_START_S > START_TIMEOUT_S > 2 * CELL_START_S
    for name in names:
        path = tmp_path / "large" / name / "config.yaml"
        config = load_config(path)
        config.train.tokens = 20 * BATCH
        config.train.timeout_s = config.train.hang_timeout_s = START_TIMEOUT_S
        save_config(config, path)
    codes, logs = ranks(tmp_path / "large", names, "large cells")
    assert codes == [0, 0], logs


@pytest.mark.parametrize("alone", [True, False])
def test_cells_retrained_without_a_driver_are_no_longer_marked_as_diverged(
    tmp_path: Path, alone: bool
) -> None:
    make_store(tmp_path / "store")
    mine = tmp_path / "again"
    name = make_sweep(mine, tmp_path / "store", GRID)[1]  # the shortest
    write_record(mine / name, DivergedError("FVU 7"))
    codes, logs = ranks(mine / name, []) if alone else ranks(mine, [name])
    assert codes == [0, 0], logs
    assert read_record(mine / name) is None


def test_cells_that_fail_or_diverge_leave_the_others_alone(alone: Path) -> None:
    mine = alone.parent / "failing"
    grid = SweepConfig(
        n_latents=[60, 90],
        k=[3, 4],
        seed=[0],
        overrides=[
            "n60-k3-seed0:optim.lr=1e30",
            "n90-k3-seed0:optim.lr=3.0",
            "n90-k3-seed0:optim.clip_norm=0",
        ],
        diverged_fvu=1.0,
        diverged_grace_tokens=20 * BATCH,
    )
    names = make_sweep(mine, alone.parent / "store", grid)
    codes, logs = ranks(mine, names)
    assert codes == [0, 0], logs
    failed, stopped = read_record(mine / "n60-k3-seed0"), read_record(mine / "n90-k3-seed0")
    assert failed is not None and failed.state == FAILED and "is not finite" in failed.reason
    assert stopped is not None and stopped.state == STOPPED, stopped
    assert "expected at most sweep.diverged_fvu=1" in stopped.reason
    good = ["n60-k4-seed0", "n90-k4-seed0"]
    assert [read_record(mine / name) for name in good] == [None, None]
    same_ends(alone, mine, good)
    sweep = read_sweep(str(mine), "fvu")
    assert {cell.name for cell in sweep.cells} == set(good)
    assert sweep.left_out["n90-k3-seed0"].startswith("stopped: FVU")
