"""A small run of one rank without a driver, trained like `python -m cluster.rank`."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch

from activation_store import StoreWriter
from cluster.run_folder.saved_config import save_config
from conf.schema.run import RunConfig
from sae_core.checkpoint.folder import list_checkpoints, step_of
from sae_core.checkpoint.row_ranges import read_tensors
from sae_core.config import CheckpointConfig, OptimConfig, TopKConfig, TrainConfig
from tests.support.ranks import Ranks, cluster_rank

STEPS, EVERY, BATCH, D = 60, 20, 64, 16


def make_store(path: Path) -> None:
    """Write a store with five items of synthetic activations."""
    rng = np.random.default_rng(0)
    directions = rng.normal(size=(64, D)).astype(np.float32)
    writer = StoreWriter(path, {"acts": D}, dtype="float32", shard_tokens=512)
    for item in range(5):
        weights = rng.random((512, 64)) * (rng.random((512, 64)) < 0.05)
        writer.write_item(item, (weights @ directions).astype(np.float32))
    writer.finalise()


def make_run(folder: Path, store: Path, wandb: str = "disabled") -> Path:
    """Create a run folder with its config, and return the folder."""
    (folder / "logs").mkdir(parents=True)
    config = RunConfig(
        name=folder.name,
        stage="train",
        runs_dir=str(folder.parent),
        sae=TopKConfig(n_latents=80, k=4, auxk=8, dead_after_tokens=1000),
        optim=OptimConfig(lr=2e-3),
        train=TrainConfig(STEPS * BATCH, BATCH, sample_tokens=500, threads_per_rank=1),
        checkpoint=CheckpointConfig(every_tokens=EVERY * BATCH),
    )
    config.store.path = str(store)
    config.store.window_items, config.store.buffer_tokens = 2, 512
    config.logging.wandb, config.logging.every_steps = wandb, 5
    save_config(config, folder / "config.yaml")
    return folder


def train(run_dir: Path, **variables: str) -> str:
    """Train to the end with these environment variables and return the rank's printed output."""
    log = run_dir / "ranks" / "rank-0.log"
    before = len(log.read_text()) if log.exists() else 0
    ranks = Ranks(run_dir / "ranks", 1, _rank, str(run_dir), variables)
    codes = ranks.codes()
    assert codes == [0], ranks.logs()
    return log.read_text()[before:]


def _rank(run_dir: str, variables: dict[str, str]) -> int:
    from cluster.training import metric_sinks

    os.environ.update(variables)
    metric_sinks._WANDB_TIMEOUT_S = 5.0
    return cluster_rank(run_dir)


def last_state(run_dir: Path) -> dict[str, torch.Tensor]:
    """Read the weights and moments of the last checkpoint."""
    newest = list_checkpoints(run_dir / "checkpoints")[0]
    assert step_of(newest) == STEPS
    return read_tensors(newest / "weights") | read_tensors(newest / "optimizer")


def assert_same_end(one: Path, other: Path) -> None:
    """Check that two runs ended with the same weights and moments, bit for bit."""
    a, b = last_state(one), last_state(other)
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert torch.equal(tensor, b[name]), name
