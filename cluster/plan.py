"""The plan stage: what the run will take, by arithmetic alone, and what cannot fit."""

from __future__ import annotations

import shutil
from pathlib import Path

from rich.console import Console
from rich.table import Table

from cluster.environment import memory_bytes
from conf.schema import RunConfig
from sae_core.errors import ConfigError
from sae_core.mesh import row_range

_ITEM_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
_SIDECAR_BYTES_PER_TOKEN = 4 + 8 + 4
_SCALE_BYTES = 4
"""Of a row of codec int8."""


def run(config: RunConfig, run_dir: Path) -> None:
    """Prints parameters, bytes and steps; refuses what the machine's memory or disk cannot hold.

    Raises:
        ConfigError: naming the setting to change.
    """
    from cluster.models import hidden_size

    d_model = hidden_size(config.model, Path(config.cache_dir).expanduser())
    rank_bytes = memory_bytes_per_rank(config, d_model)
    store_bytes = store_bytes_total(config, d_model)
    copy_bytes = checkpoint_bytes_per_rank(config, d_model)
    Console().print(_table(config, d_model, rank_bytes, copy_bytes, store_bytes))
    if config.train.device != "cuda":
        _check_memory(config, rank_bytes + copy_bytes)
    _check_disk(config, store_bytes)


def memory_bytes_per_rank(config: RunConfig, d_model: int) -> int:
    """What one rank's largest shard and its data replica's share of ZeRO 1 take, plus buffers.

    Weights are float32; moments as configured; gradients exist only without the fused update;
    bfloat16 copies only where the kernels are Triton's.
    """
    start, stop = row_range(config.sae.n_latents, 0, config.parallel.latent)
    parameters = (stop - start) * (2 * d_model + 1) + d_model
    zero = config.parallel.zero_stage
    moments = 2 * _ITEM_BYTES[config.optim.moments] / (config.parallel.data if zero else 1)
    gradients = 0 if config.optim.fused(zero) else 4
    on_cuda = config.train.device == "cuda" and config.train.compute_dtype in ("auto", "bfloat16")
    copies = 2 if on_cuda and config.train.kernels in ("auto", "triton") else 0
    state = int(parameters * (4 + moments + gradients + copies))
    width = d_model * _ITEM_BYTES[config.store.dtype]
    buffers = 3 * config.store.buffer_tokens // config.parallel.n_ranks * width
    batch = 6 * config.train.batch_tokens // config.parallel.data * d_model * 4
    return state + buffers + batch


def checkpoint_bytes_per_rank(config: RunConfig, d_model: int) -> int:
    """Host memory that a rank's share of a checkpoint takes, beside what it trains with.

    The copy, which a synchronous save on the CPU does without, and twice one matrix: the writer
    puts a file together in memory.
    """
    start, stop = row_range(config.sae.n_latents, 0, config.parallel.latent)
    rows = -(-(stop - start) // config.parallel.data)
    copies = 2 * rows * d_model * (4 + 2 * _ITEM_BYTES[config.optim.moments])
    if not config.checkpoint.asynchronous and config.train.device != "cuda":
        copies = 0
    return copies + 2 * rows * d_model * 4


def store_bytes_total(config: RunConfig, d_model: int) -> int:
    """Bytes of all arrays and sidecars; of codec blosc as many as without, which is the most."""
    width = _row_bytes(config, d_model) * len(config.model.hookpoints)
    return config.data.tokens * (width + _SIDECAR_BYTES_PER_TOKEN)


def read_bytes_per_rank(config: RunConfig, d_model: int) -> int:
    """What each rank reads in the whole run: all of them read every row once between them.

    Where the parts of two ranks meet in a chunk both read it: that is not counted.
    """
    return config.train.tokens * _row_bytes(config, d_model) // config.parallel.n_ranks


def _row_bytes(config: RunConfig, d_model: int) -> int:
    """Of one row of one array, as stored."""
    if config.store.codec == "int8":
        return d_model + _SCALE_BYTES
    return d_model * _ITEM_BYTES[config.store.dtype]


def _table(
    config: RunConfig, d_model: int, rank_bytes: int, copy_bytes: int, store_bytes: int
) -> Table:
    from sae_core.topk import sent_bytes

    table = Table(title=f"plan: {config.name}", show_header=False, title_justify="left")
    epochs = config.train.tokens / config.data.tokens
    mesh = config.parallel
    rows = {
        "hookpoints": f"{', '.join(config.model.hookpoints)}, d_model {d_model}",
        "dictionary": f"{config.sae.n_latents:,} latents, k {config.sae.k}, "
        f"{2 * config.sae.n_latents * d_model:,} weights",
        "mesh": f"{mesh.latent} latent x {mesh.data} data, ZeRO {mesh.zero_stage}",
        "memory per rank": f"{rank_bytes / 2**30:.2f} GiB: weights, moments, gradients, buffers; "
        f"{copy_bytes / 2**30:.2f} GiB more on the host while a checkpoint is written",
        "store": f"{config.data.tokens:,} tokens, {store_bytes / 2**30:.2f} GiB",
        "training": f"{config.train.n_steps:,} steps of {config.train.batch_tokens:,} tokens, "
        f"{epochs:.1f} epochs",
        "reading": f"{read_bytes_per_rank(config, d_model) / 2**30:.2f} GiB by each rank",
    }
    if mesh.latent > 1:
        rows_per_replica = config.train.batch_tokens // mesh.data
        sent = sent_bytes(rows_per_replica, config.sae.k, mesh.latent, 0)
        rows["selection"] = f"{sent / 2**20:.2f} MiB sent by each rank and step"
    for key, value in rows.items():
        table.add_row(key, value)
    return table


def _check_memory(config: RunConfig, rank_bytes: int) -> None:
    total = rank_bytes * config.parallel.n_ranks
    available = memory_bytes()
    if config.cluster.address is None and available is not None and total > available:
        raise ConfigError(
            "sae.n_latents",
            config.sae.n_latents,
            f"at most {available / 2**30:.0f} GiB on this machine, all ranks need "
            f"{total / 2**30:.0f} GiB",
            "use fewer latents, parallel.zero_stage=1 with parallel.data > 1, or more machines",
        )


def _check_disk(config: RunConfig, store_bytes: int) -> None:
    path = Path(config.store.path)
    if "://" in config.store.path or path.exists():
        return  # what is still missing is at most what was planned when it was begun
    while not path.exists():
        path = path.parent
    free = shutil.disk_usage(path).free
    if store_bytes > free:
        raise ConfigError(
            "data.tokens",
            config.data.tokens,
            f"at most {free / 2**30:.0f} GiB free at {path}, the store needs "
            f"{store_bytes / 2**30:.0f} GiB",
            "store fewer tokens or put store.path on a larger disk",
        )
