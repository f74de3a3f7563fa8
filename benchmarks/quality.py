"""Compare the SAEs that different kernels and settings train from the same data, seed and schedule.

    python -m benchmarks.quality --store runs/demo/store [--n-latents N] [--tokens N]
        [--k N] [--lr RATE] [--dead-after N] [--weakened SHARE] [--variants NAME ...] [--json FILE]

The benchmark answers whether a faster step trains a worse SAE. Every variant trains in this
process, from the same initial dictionary on the same batches. A row gives the mean FVU over the
last tenth of training, the fraction of dead latents at the end, and the training curve. `fvu_ratio`
is relative to the first variant.

Afterwards, each prefilter selects the TopK of real rows with the last trained dictionary. The
float8 product is emulated in float32, which selects the same latents but at a different speed.

With `--weakened SHARE`, that share of the encoder's rows starts at a quarter of the usual length.
The latents of these rows never fire at first, and only the auxiliary loss can revive them.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from activation_store import Store, open_store
from benchmarks.harness.one_rank import start_one_rank
from benchmarks.harness.rounded_kernels import ROUNDED
from benchmarks.harness.table import format_table, write_json
from cluster.training.batch_order import BatchOrder
from cluster.training.store_source import StoreSource
from sae_core.architectures.topk.settings import topk_settings
from sae_core.config import CheckpointConfig, OptimConfig, TopKConfig, TrainConfig, TrainerConfig
from sae_core.distributed.mesh import Mesh
from sae_core.kernels.prefilter import Prefilter, uncertified
from sae_core.kernels.registry import KERNELS
from sae_core.kernels.stock.body import StockKernels
from sae_core.kernels.stock.prefilter_bfloat16 import Bfloat16Prefilter
from sae_core.kernels.triton.prefilter_float8 import (
    Float8Prefilter,
    SplitRows,
    dequantise,
    split_rows,
)
from sae_core.training.lockstep import train_to_end
from sae_core.training.malloc import keep_freed_memory
from sae_core.training.trainer import Trainer

SEED = 0
BATCH_TOKENS = 2048
CHECKED_ROWS = 8192
COLUMNS = ("system", "op", "fvu", "fvu_ratio", "dead_fraction", "tokens_per_s")
CHECK_COLUMNS = ("system", "op", "certified", "equal_rows", "low_precision_equal_rows")

# Name of a variant -> the settings in which it differs from the base config.
VARIANTS: dict[str, dict[str, Any]] = {
    "reference": {"kernels": "reference", "prefilter": "none", "update": "dense"},
    "stock, dense update": {"prefilter": "none", "update": "dense"},
    "stock, fused update": {"prefilter": "none"},
    "stock, fused, prefilter": {"prefilter": "bfloat16x3"},
    "bfloat16 product": {"compute_dtype": "bfloat16"},
    "bfloat16 moments": {"moments": "bfloat16"},
    "rounded as on a GPU": {"kernels": "rounded", "prefilter": "none"},
    "auxk on 1/4 of the rows": {"auxk_rows": 1 / 4},
    "auxk on 1/8 of the rows": {"auxk_rows": 1 / 8},
    "auxk on 1/16 of the rows": {"auxk_rows": 1 / 16},
    "no auxk": {"auxk_coef": 0.0},
}


def main() -> None:
    """Train all variants, check the prefilters, print both tables and write them with `--json`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--store", required=True, help="path of the store")
    parser.add_argument("--n-latents", type=int, default=4096, help="latents of each SAE")
    parser.add_argument("--k", type=int, default=32, help="active latents per token")
    parser.add_argument(
        "--lr", type=float, help="default: 2e-3 at 4096 latents, scaled as 1/sqrt(n_latents)"
    )
    parser.add_argument("--tokens", type=int, default=1_000_000, help="training tokens of each SAE")
    parser.add_argument(
        "--dead-after",
        type=int,
        default=200_000,
        help="a latent that has not fired for this many tokens is dead",
    )
    parser.add_argument(
        "--weakened",
        type=float,
        default=0.0,
        help="share of latents whose encoder row starts at a quarter of its length",
    )
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--json", metavar="FILE", help="also write the rows to this file")
    options = parser.parse_args()
    keep_freed_memory()
    start_one_rank()
    store = open_store(options.store)
    base = base_config(options.n_latents, options.tokens, options.dead_after, options.k, options.lr)
    rows: list[dict[str, Any]] = []
    for name in options.variants:
        trainer, row = train(store, base, name, options.weakened)
        row["fvu_ratio"] = row["fvu"] / (rows[0] if rows else row)["fvu"]
        rows.append(row)
        print(format_table(rows, COLUMNS), flush=True)
    checks = prefilter_rows(trainer)
    print(format_table(checks, CHECK_COLUMNS))
    if options.json:
        write_json(options.json, rows + checks)
    dist.destroy_process_group()


def base_config(
    n_latents: int, tokens: int, dead_after_tokens: int, k: int = 32, lr: float | None = None
) -> TrainerConfig:
    """Return the config that every variant modifies.

    Args:
        n_latents: Number of latents.
        tokens: Number of training tokens.
        dead_after_tokens: Number of tokens without firing after which a latent counts as dead.
        k: Number of active latents per token.
        lr: Learning rate. If None, it is 2e-3 at 4096 latents, scaled as 1/sqrt(n_latents).
    """
    return TrainerConfig(
        TopKConfig(n_latents=n_latents, k=k, auxk=256, dead_after_tokens=dead_after_tokens),
        OptimConfig(
            lr=lr or 2e-3 * (4096 / n_latents) ** 0.5,
            warmup_tokens=tokens // 20,
            decay_tokens=tokens // 5,
        ),
        TrainConfig(tokens, BATCH_TOKENS),
        checkpoint=CheckpointConfig(every_tokens=10**12),
    )


def train(
    store: Store, base: TrainerConfig, name: str, weakened: float = 0.0
) -> tuple[Trainer, dict[str, Any]]:
    """Train one variant on the first array of a store.

    Args:
        store: Store of activations to train on.
        base: Config that the variant modifies.
        name: Key of `VARIANTS`.
        weakened: Share of latents whose encoder row starts at a quarter of its length.

    Returns:
        The trainer, and the variant's row.
    """
    config = _changed(base, VARIANTS[name])
    array = next(iter(store.arrays))
    order = BatchOrder(SEED, BATCH_TOKENS, window_items=16, buffer_tokens=65_536)
    source = StoreSource(store, array, order)
    curve: list[dict[str, Any]] = []

    def keep(row: dict[str, Any]) -> None:
        curve.append(row)

    with tempfile.TemporaryDirectory() as folder:
        mesh = Mesh.create("cpu", 1, 1)
        with KERNELS.registered("rounded", ROUNDED):
            trainer = Trainer(config, mesh, source, Path(folder), SEED, keep, report_every=10)
        trainer.calibrate()
        _weaken(trainer, weakened)
        train_to_end(trainer)
    tail = curve[-max(1, len(curve) // 10) :]
    return trainer, {
        "work": {
            "L": config.sae.n_latents,
            "D": source.d_in,
            "B": BATCH_TOKENS,
            "k": config.sae.active_latents(),
            "tokens": config.train.tokens,
            "dead_after_tokens": config.sae.dead_after_tokens,
            "weakened": weakened,
        },
        "system": "ours",
        "op": name,
        "fvu": statistics.fmean(row["fvu"] for row in tail),
        "dead_fraction": curve[-1]["dead_fraction"],
        "most_dead_fraction": max(row["dead_fraction"] for row in curve),
        "tokens_per_s": statistics.median(row["tokens_per_s"] for row in curve),
        "curve": [
            {key: row[key] for key in ("step", "loss", "fvu", "dead_fraction")} for row in curve
        ],
    }


def _weaken(trainer: Trainer, share: float) -> None:
    """Scale the first `share` of the encoder's rows to a quarter."""
    engine = trainer.engine
    with torch.no_grad():
        engine.sae.W_enc[: int(share * len(engine.sae.W_enc))] /= 4
    engine.sync_edited_parameters()


def _changed(base: TrainerConfig, values: dict[str, Any]) -> TrainerConfig:
    """Return `base` with each value set in whichever part of the config has that field."""
    parts = {}
    for part in ("sae", "optim", "train"):
        old = getattr(base, part)
        parts[part] = replace(old, **{k: v for k, v in values.items() if hasattr(old, k)})
    return replace(base, **parts)


def prefilter_rows(trainer: Trainer) -> list[dict[str, Any]]:
    """Measure how often each prefilter certifies real rows, and how often these rows are exact.

    Returns:
        One row per prefilter. `certified`: share of rows whose candidates are proven to hold the
        exact TopK. `equal_rows`: share of the certified rows whose candidates do hold it; None if
        no row is certified. `low_precision_equal_rows`: share of all rows whose low-precision TopK
        is already exact.
    """
    sae = trainer.engine.sae
    exact = StockKernels(torch.float32)
    x = (sae.normalise(trainer.source.sample(CHECKED_ROWS)) - sae.b_dec).detach()
    W, b, k = sae.W_enc.detach(), sae.b_enc.detach(), topk_settings(sae.config).k
    wanted_values, wanted = exact.exact_topk(x, W, b, k)

    def float8_topk(x: SplitRows, W: SplitRows, b: torch.Tensor, count: int) -> Any:
        return exact.exact_topk(dequantise(x), dequantise(W), b, count)

    prefilters: list[Prefilter] = [
        Bfloat16Prefilter(split=True),
        Bfloat16Prefilter(split=False),
        Float8Prefilter(float8_topk, split_rows),
    ]
    rows = []
    for prefilter in prefilters:
        offered = prefilter.candidates(x, W, b, k)
        certified = ~uncertified(offered, wanted_values[:, -1], len(W))
        held = (offered.latents[:, :, None] == wanted[:, None, :]).any(1).all(1)
        low = offered.latents[:, :k].sort(1).values == wanted.sort(1).values
        rows.append(
            {
                "work": {"L": len(W), "D": W.shape[1], "B": CHECKED_ROWS, "k": k},
                "system": "ours",
                "op": f"prefilter {prefilter.name}",
                "candidates": offered.latents.shape[1],
                "certified": float(certified.float().mean()),
                "equal_rows": float(held[certified].float().mean())
                if bool(certified.any())
                else None,
                "low_precision_equal_rows": float(low.all(1).float().mean()),
                "channel_rms_most_over_median": float(_outliers(x)),
            }
        )
    return rows


def _outliers(x: torch.Tensor) -> torch.Tensor:
    """Return the largest root mean square of a channel of x [B, D], divided by the median one."""
    rms = x.square().mean(0).sqrt()
    return rms.max() / rms.median()


if __name__ == "__main__":
    main()
