"""The plan stage: what the run will take, by arithmetic alone, and what cannot fit."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from cluster.planning import tables
from cluster.planning.hardware import GIB, Hardware, gpu
from cluster.planning.layout import Layout, best_layout, cannot_fit, layouts, plan_layout
from cluster.planning.local import local
from cluster.planning.scaling import weak_scaling
from cluster.planning.work import stored_row_bytes
from cluster.trainable import others
from conf.schema import RunConfig
from sae_core.errors import ConfigError

_SIDECAR_BYTES_PER_TOKEN = 4 + 8 + 4


def run(config: RunConfig, run_dir: Path) -> None:
    """Prints memory, time, traffic and cost; refuses what the planned machines cannot hold.

    Within a pipeline nothing is measured: where this machine was not before, times are left out.

    Raises:
        ConfigError: naming the setting to change.
    """
    d_model = _d_model(config)
    alone = config.stage == "plan"
    if not alone:  # what training would refuse after a long harvest
        others(config, config.sae.hookpoint or config.model.hookpoints[0])
    hardware = planned_hardware(config, measure=alone)
    show = Console().print
    if config.plan.n_gpus is None or not alone:  # a pipeline trains on the mesh of parallel.*
        layout = plan_layout(config, d_model, hardware, config.parallel)
    else:
        found = layouts(config, d_model, hardware, config.plan.n_gpus)
        if found:
            show(tables.layout_table(found))
        layout = best_layout(found, config)
        config = replace(config, parallel=layout.parallel)
    show(_summary(config, d_model, layout, hardware))
    if alone:
        _show_details(config, layout, hardware)
    if config.cluster.address is None and not layout.fits:
        raise cannot_fit(layout, config)
    _check_disk(config, store_bytes_total(config, d_model))
    if alone and config.plan.simulate:
        rows = weak_scaling(config, d_model, hardware)
        show(tables.scaling_table(rows, config.plan.grow))


def planned_hardware(config: RunConfig, *, measure: bool) -> Hardware:
    """What `plan.hardware` says; `measure`: this machine, where it was not measured before."""
    if config.plan.hardware != "local":
        return gpu(config.plan)
    cache_dir = Path(config.cache_dir).expanduser()
    return local(config.plan, cache_dir, config.train.device, measure=measure)


def store_bytes_total(config: RunConfig, d_model: int) -> int:
    """Bytes of all arrays and sidecars; of codec blosc as many as without, which is the most.

    Where what is consumed is deleted: of what the harvest may be ahead, the windows in use, and
    what was read since the oldest checkpoint that is kept. By tokens: by the clock they may come
    more often, never more seldom.
    """
    tokens, cluster, checkpoint = config.data.tokens, config.cluster, config.checkpoint
    milestones = checkpoint.keep_every_tokens is not None  # the first of them is kept for ever
    if cluster.retention == "consumed" and cluster.max_lead_items is not None and not milestones:
        items = cluster.max_lead_items + 2 * config.store.window_items
        held = (checkpoint.keep + 1) * checkpoint.every_tokens
        tokens = min(tokens, items * config.store.shard_tokens + held)
    width = stored_row_bytes(config, d_model) * len(config.model.hookpoints)
    return tokens * (width + _SIDECAR_BYTES_PER_TOKEN)


def read_bytes_per_rank(config: RunConfig, d_model: int) -> int:
    """What each rank reads in the whole run: all of them read every row once between them.

    Of a mixture each reads all. Where the parts of two ranks meet in a chunk both read it: that is
    not counted.
    """
    parts = 1 if config.store.mixture else config.parallel.n_ranks
    return config.train.tokens * stored_row_bytes(config, d_model) // parts


def _d_model(config: RunConfig) -> int:
    if config.model.d_model is not None:
        return config.model.d_model
    from cluster.models import hidden_size

    return hidden_size(config.model, Path(config.cache_dir).expanduser())


def _summary(config: RunConfig, d_model: int, layout: Layout, hardware: Hardware) -> Table:
    table = Table(title=f"plan: {config.name}", show_header=False, title_justify="left")
    epochs = f", {config.train.tokens / config.data.tokens:.1f} epochs"
    if config.store.mixture:
        epochs = f", on {len(config.store.paths)} stores"
    mesh = config.parallel
    rank_bytes, host_bytes = layout.device_total, sum(layout.host.values())
    store_bytes = store_bytes_total(config, d_model)
    rows = {
        "hardware": hardware.name if hardware.timed else f"{hardware.name}, not measured",
        "hookpoints": f"{', '.join(config.model.hookpoints)}, d_model {d_model}",
        "dictionary": f"{config.sae.n_latents:,} latents, k {config.sae.k}, "
        f"{2 * config.sae.n_latents * d_model:,} weights",
        "mesh": f"{mesh.latent} latent x {mesh.data} data, ZeRO {mesh.zero_stage} "
        f"(parallel.latent={mesh.latent} parallel.data={mesh.data} "
        f"parallel.zero_stage={mesh.zero_stage})",
        "memory per rank": f"{rank_bytes / GIB:.2f} GiB; {host_bytes / GIB:.2f} GiB more on the "
        "host while a checkpoint is written",
        "store": f"{config.data.tokens:,} tokens, at most {store_bytes / GIB:,.2f} GiB at once",
        "training": f"{config.train.n_steps:,} steps of {config.train.batch_tokens:,} tokens"
        + epochs,
        "reading": f"{read_bytes_per_rank(config, d_model) / GIB:,.2f} GiB by each rank",
    }
    for key, value in rows.items():
        table.add_row(key, value)
    return table


def _show_details(config: RunConfig, layout: Layout, hardware: Hardware) -> None:
    show = Console().print
    show(tables.memory_table(layout))
    if hardware.timed:
        show(tables.step_table(layout))
        if layout.work.n_ranks > 1:
            show(tables.traffic_table(layout, hardware))
        show(tables.run_table(layout, config, hardware))


def _check_disk(config: RunConfig, store_bytes: int) -> None:
    if config.plan.disk_tib is not None:
        room, where = config.plan.disk_tib * 2**40, "planned for the store (plan.disk_tib)"
    else:
        path = Path(config.store.path)
        if config.plan.hardware != "local" or "://" in config.store.path or path.exists():
            return  # what is still missing is at most what was planned when it was begun
        while not path.exists():
            path = path.parent
        room, where = shutil.disk_usage(path).free, f"free at {path}"
    if store_bytes > room:
        raise ConfigError(
            "data.tokens",
            config.data.tokens,
            f"at most {room / GIB:.0f} GiB {where}, the store needs {store_bytes / GIB:.0f} GiB",
            "store fewer tokens or put store.path on a larger disk",
        )
