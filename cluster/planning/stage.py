"""The plan stage: estimate a run's memory, time, traffic and cost without running it."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from cluster.language_model.hookpoint_kinds import require_usable
from cluster.language_model.texts import require_text
from cluster.planning import tables
from cluster.planning.hardware import Hardware
from cluster.planning.local import planned_hardware
from cluster.planning.memory import saved_bytes
from cluster.planning.mesh_search import Layout, best_layout, layouts, plan_layout, too_large_error
from cluster.planning.scaling import weak_scaling
from cluster.planning.storage import read_bytes_per_rank, store_bytes_total
from cluster.run_folder.opening import announce_extension
from cluster.training.store_checks import mixed_in_stores
from conf.hookpoint import find_hookpoint
from conf.schema.run import RunConfig
from foundation.errors import ConfigError
from foundation.units import bytes_text


def run(config: RunConfig, run_dir: Path) -> None:
    """Print memory, time, traffic and cost, and check that the run fits the planned machines.

    As the first stage of a pipeline, this stage measures nothing: if this machine has not been
    measured before, the times are left out.

    Raises:
        ConfigError: If the run does not fit. The error names the setting to change.
        RunDirError: If the run was already trained on more tokens.
        TextError: In a pipeline, if the text is missing or cannot be read.
    """
    if config.stage != "plan":
        require_text(config.data)  # the harvest would find out only after this stage
    else:
        announce_extension(config, run_dir)
    require_usable(config.model)
    widths = _widths(config)
    trained = config.sae.hookpoint or next(iter(config.model.hookpoints), "")
    d_model = config.model.d_model or widths[find_hookpoint(trained, widths) or trained]
    alone = config.stage == "plan"
    if not alone:
        # Check these stores now, because training would reject them only after a long harvest.
        mixed_in_stores(config, find_hookpoint(trained, config.model.hookpoints) or trained)
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
    show(_summary(config, widths, layout, hardware))
    if alone:
        _show_details(config, widths, layout, hardware)
    if config.cluster.address is None and not layout.fits:
        raise too_large_error(layout, config)
    _check_disk(config, store_bytes_total(config, list(widths.values())))
    if alone and config.plan.simulate:
        rows = weak_scaling(config, d_model, hardware)
        show(tables.scaling_table(rows, config.plan.grow))


def _widths(config: RunConfig) -> dict[str, int]:
    """Return the width of each hookpoint's rows; `model.d_model` for all of them if it is set."""
    hookpoints = [*config.model.hookpoints]
    trained = config.sae.hookpoint
    if trained is not None and find_hookpoint(trained, hookpoints) is None:
        hookpoints.append(trained)
    if config.model.d_model is not None:
        return dict.fromkeys(hookpoints, config.model.d_model)
    from cluster.language_model.model_checks import hookpoint_width

    cache_dir = Path(config.cache_dir).expanduser()
    return {name: hookpoint_width(config.model, name, cache_dir) for name in hookpoints}


def _summary(
    config: RunConfig, widths: dict[str, int], layout: Layout, hardware: Hardware
) -> Table:
    d_model = layout.work.d_model
    table = Table(title=f"plan: {config.name}", show_header=False, title_justify="left")
    epochs = f", {config.train.tokens / config.data.tokens:.1f} epochs"
    if config.store.mixture:
        epochs = f", on {len(config.store.paths)} stores"
    mesh = config.parallel
    rank_bytes = layout.device_total
    host_bytes = sum(layout.host.values())
    store_bytes = store_bytes_total(config, list(widths.values()))
    rows = {
        "hardware": hardware.name if hardware.timed else f"{hardware.name}, not measured",
        "hookpoints": f"{', '.join(config.model.hookpoints)}, d_model "
        + ", ".join(str(width) for width in dict.fromkeys([*widths.values()] or [d_model])),
        "dictionary": f"{config.sae.n_latents:,} latents, {_active(config)}, "
        f"{2 * config.sae.n_latents * d_model:,} weights" + _auxiliary(config, d_model),
        "mesh": f"{mesh.latent} latent x {mesh.data} data, ZeRO {mesh.zero_stage} "
        f"(parallel.latent={mesh.latent} parallel.data={mesh.data} "
        f"parallel.zero_stage={mesh.zero_stage})",
        "memory per rank": f"{bytes_text(rank_bytes)}; another {bytes_text(host_bytes)} on "
        "the host while a checkpoint is written",
        "checkpoint": f"{bytes_text(saved_bytes(layout.work))} per rank, {_background(layout)}",
        "store": f"{config.data.tokens:,} tokens, at most {bytes_text(store_bytes)} at once",
        "training": f"{config.train.n_steps:,} steps of {config.train.batch_tokens:,} tokens"
        + epochs,
        "reading": f"{bytes_text(read_bytes_per_rank(config, d_model))} per rank",
    }
    for key, value in rows.items():
        table.add_row(key, value)
    return table


def _background(layout: Layout) -> str:
    blocking = layout.blocking_bytes
    if not blocking:
        return "written while training continues"
    if not layout.work.asynchronous_save:
        return "written while training waits (checkpoint.asynchronous=false)"
    return (
        f"of which training waits for {bytes_text(blocking)} to be written, because the host has "
        "no memory to copy them"
    )


def _active(config: RunConfig) -> str:
    active = config.sae.active_latents()
    return "all of them counted as active" if active is None else f"k {active}"


def _auxiliary(config: RunConfig, d_model: int) -> str:
    train = config.train
    sae = config.sae.resolved(d_model, train.batch_tokens, train.tokens)
    path = sae.auxiliary_path(d_model)
    if path is None:
        return ""
    return f", auxiliary loss on {path.row_share:g} of the rows"


def _show_details(
    config: RunConfig, widths: dict[str, int], layout: Layout, hardware: Hardware
) -> None:
    show = Console().print
    show(tables.memory_table(layout))
    if layout.work.on_gpu:
        show(tables.peak_table(layout))
    if hardware.timed:
        show(tables.step_table(layout))
        if layout.work.n_ranks > 1:
            show(tables.traffic_table(layout, hardware))
        show(tables.run_table(layout, config, hardware, list(widths.values())))


def _check_disk(config: RunConfig, store_bytes: int) -> None:
    """Check that the store fits into `plan.disk_tib` or, by default, into its disk's free space.

    Raises:
        ConfigError: If the store is too large.
    """
    if config.plan.disk_tib is not None:
        room = config.plan.disk_tib * 2**40
        where = "plan.disk_tib"
    else:
        path = Path(config.store.path)
        if config.plan.hardware != "local" or "://" in config.store.path or path.exists():
            # Remote disks cannot be checked from here. An existing store was checked when it was
            # created, and needs no more space than was planned then.
            return
        while not path.exists():
            path = path.parent
        room = shutil.disk_usage(path).free
        where = f"free at {path}"
    if store_bytes > room:
        raise ConfigError(
            "data.tokens",
            config.data.tokens,
            f"a store of at most {bytes_text(room)} ({where}), but these tokens need "
            f"{bytes_text(store_bytes)}",
            "store fewer tokens, or set store.path to a folder on a larger disk",
        )
