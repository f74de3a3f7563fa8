"""Test that slow saves do not count as hangs within `checkpoint.timeout_s`."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest

from activation_store import StoreWriter
from cluster.run_folder.saved_config import save_config
from conf.schema.run import RunConfig
from sae_core.checkpoint.folder import newest_valid, step_of
from sae_core.config import CheckpointConfig, TopKConfig, TrainConfig
from tests.support.ranks import Ranks, cluster_rank

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

STEPS, BATCH, HANG_S, WRITING_S = 20, 64, 4.0, 9.0


def train(folder: Path, checkpoint: CheckpointConfig) -> tuple[int, str]:
    (folder / "run" / "logs").mkdir(parents=True)
    writer = StoreWriter(folder / "store", {"acts": 16}, dtype="float32", shard_tokens=1024)
    for item in range(2):
        rows = np.random.default_rng(item).normal(size=(1024, 16)).astype(np.float32)
        writer.write_item(item, rows)
    writer.finalise()
    config = RunConfig(
        name="run",
        stage="train",
        runs_dir=str(folder),
        sae=TopKConfig(n_latents=64, k=4, auxk=4),
        train=TrainConfig(STEPS * BATCH, BATCH, sample_tokens=500, hang_timeout_s=HANG_S),
        checkpoint=checkpoint,
    )
    config.store.path, config.logging.wandb = str(folder / "store"), "disabled"
    save_config(config, folder / "run" / "config.yaml")
    rank = Ranks(folder / "ranks", 1, _rank, str(folder / "run"))
    return rank.codes()[0], rank.logs()[0]


def _rank(run_dir: str) -> int:
    """Run `python -m cluster.rank` with a disk that is slow for checkpoints."""
    from sae_core.checkpoint import save

    real = save._hash_share

    def slow(temporary: Path, names: list[str]) -> object:
        time.sleep(WRITING_S)
        return real(temporary, names)

    save._hash_share = slow  # type: ignore[assignment]
    return cluster_rank(run_dir)


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_long_save_does_not_count_as_a_hang(tmp_path, asynchronous):
    code, log = train(tmp_path, CheckpointConfig(asynchronous=asynchronous))
    assert code == 0, log
    newest = newest_valid(tmp_path / "run" / "checkpoints")
    assert newest is not None and step_of(newest) == STEPS


def test_a_save_beyond_its_timeout_counts_as_a_hang(tmp_path):
    code, log = train(tmp_path, CheckpointConfig(timeout_s=1.0))
    assert code == 1 and f"no progress for {HANG_S:g} s" in log, log
    assert "in slow" in log, "the stack of the writing thread is missing"
