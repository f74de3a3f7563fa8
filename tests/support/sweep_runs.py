"""Write the files of a sweep's runs without training them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cluster.run_folder.files import METRICS
from cluster.run_folder.metrics_log import MetricsWriter
from cluster.run_folder.saved_config import save_config
from conf.schema.run import RunConfig
from sae_core.config import TopKConfig

D_MODEL = 64
STEPS, BATCH_TOKENS = 400, 1000
GPT4 = np.array([-0.50, 0.26, -0.017, -0.042, -1.32, -0.085])
"""alpha, beta_k, beta_n, gamma, zeta and eta of Gao et al. 2024 for GPT-4's activations."""


def write_run(
    folder: Path,
    n_latents: int,
    k: int,
    level: float,
    rng: np.random.Generator,
    *,
    seed: int = 0,
    lr: float | None = None,
    steps_done: int = STEPS,
    decay_tokens: int = 0,
    settles_tokens: float = 20_000.0,
    identity: str = "acts-0123",
    heldout: float | None = None,
) -> Path:
    """Write a run whose FVU falls to `level`, with 1% of noise on every row; return its folder.

    Args:
        folder: Folder of the run.
        n_latents: Number of latents.
        k: Number of active latents.
        level: Final FVU.
        rng: Source of the noise.
        seed: Seed in the run's config.
        lr: Learning rate in the run's config.
        steps_done: Last step; less than `STEPS` for an unfinished run.
        decay_tokens: Tokens of learning-rate decay in the run's config.
        settles_tokens: The distance to `level` falls by a factor of e in this many tokens.
        identity: Identity of the training data in the checkpoint.
        heldout: FVU of an evaluation on held-out rows; None if not evaluated.
    """
    (folder / "eval").mkdir(parents=True)
    save_config(_config(n_latents, k, seed, lr, decay_tokens), folder / "config.yaml")
    steps = np.arange(2, steps_done + 1, 2)
    tokens = steps * BATCH_TOKENS
    values = level * (1 + 4 * np.exp(-tokens / settles_tokens))
    values *= np.exp(0.01 * rng.standard_normal(len(steps)))
    write_rows(folder, steps, values)
    checkpoint = folder / "checkpoints" / f"step-{steps_done:08d}"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_text(json.dumps(_state(steps_done, identity)))
    if heldout is not None:
        metrics = {"fvu": heldout, "heldout": True}
        (folder / "eval" / "metrics.json").write_text(json.dumps(metrics))
    return folder


def write_rows(folder: Path, steps: NDArray[Any], values: NDArray[Any]) -> None:
    """Write `metrics.jsonl` with these FVUs, replacing any earlier file."""
    (folder / METRICS).unlink(missing_ok=True)
    log = MetricsWriter(folder)
    for step, value in zip(steps.tolist(), values.tolist(), strict=True):
        row = {"step": step, "tokens": step * BATCH_TOKENS, "sae": "a", "fvu": value}
        log.write({**row, "loss": value})
    log.close()


def _config(n_latents: int, k: int, seed: int, lr: float | None, decay_tokens: int) -> RunConfig:
    config = RunConfig(name="cell", seed=seed)
    config.sae = TopKConfig(n_latents=n_latents, k=k)
    config.optim.lr = lr
    config.optim.decay_tokens = decay_tokens
    config.train.tokens = STEPS * BATCH_TOKENS
    config.train.batch_tokens = BATCH_TOKENS
    return config


def _state(step: int, identity: str) -> dict[str, Any]:
    return {
        "step": step,
        "tokens": step * BATCH_TOKENS,
        "source_position": step,
        "source_identity": identity,
        "seed": 0,
        "batch_tokens": BATCH_TOKENS,
        "d_model": D_MODEL,
        "saes": {},
        "mesh": {},
        "schema": 1,
    }
