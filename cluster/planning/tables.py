"""The plan as tables that a person reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from rich.table import Table

from cluster.planning.hardware import GIB, Hardware, shared_among
from cluster.planning.layout import Layout
from cluster.planning.links import collectives, crosses_nodes, seconds
from conf.schema import RunConfig


class Simulated(NamedTuple):
    """One row of the weak-scaling table."""

    n_ranks: int
    mesh: str
    step_s: float
    step_efficiency: float
    failures: int
    run_efficiency: float


def memory_table(layout: Layout) -> Table:
    """Bytes of a rank by part."""
    where = "device" if layout.work.on_gpu else "process"
    table = _table("memory per rank", "part", "GiB", "where")
    for part, size in layout.device.items():
        table.add_row(part, f"{size / GIB:.3f}", where)
    table.add_row("peak", f"{layout.device_total / GIB:.3f}", where, style="bold")
    for part, size in layout.host.items():
        table.add_row(part, f"{size / GIB:.3f}", "host")
    return table


def step_table(layout: Layout) -> Table:
    """Seconds of a step by part."""
    table = _table("one step", "part", "ms", "share")
    total = sum(phase.seconds for phase in layout.phases)
    for phase in layout.phases:
        what = phase.what if phase.group is None else f"{phase.what} ({phase.group} group)"
        table.add_row(what, f"{phase.seconds * 1e3:.3f}", f"{phase.seconds / total:.1%}")
    table.add_row("step", f"{total * 1e3:.2f}", "", style="bold")
    table.add_row("reading a batch, beside it", f"{layout.read_s * 1e3:.2f}", "")
    return table


def traffic_table(layout: Layout, hardware: Hardware) -> Table:
    """Bytes of a step that a rank sends, by collective and link."""
    here = shared_among(hardware, min(layout.work.n_ranks, hardware.ranks_per_node))
    table = _table("traffic of a rank and step", "what", "collective", "MiB", "over", "ms")
    for calls in collectives(layout.work).values():
        for call in calls:
            if call.group == "all":
                link = "all"
            elif hardware.device == "cpu":
                link = "loopback"
            else:
                outside = crosses_nodes(call.group, layout.work, hardware.ranks_per_node)
                link = "network" if outside else "NVLink"
            taken = seconds(call, layout.work, here)
            sent = f"{call.sent_bytes / 2**20:.3f}"
            table.add_row(call.what, f"{call.kind}, {call.group}", sent, link, f"{taken * 1e3:.3f}")
    return table


def layout_table(found: Sequence[Layout]) -> Table:
    """What the search has compared."""
    columns = ("gradients sent", "GiB per rank", "fits", "step ms", "tokens/s")
    table = _table("layouts", "latent x data", *columns)
    for layout in found:
        work = layout.work
        table.add_row(
            f"{work.latent} x {work.data}",
            layout.exchange,
            f"{layout.device_total / GIB:.1f}",
            "yes" if layout.fits else "no",
            f"{layout.step_s * 1e3:.1f}",
            f"{work.rows * work.data / layout.step_s:,.0f}",
        )
    return table


def run_table(layout: Layout, config: RunConfig, hardware: Hardware) -> Table:
    """Duration, bandwidth, cost; of harvest and training together where they run at once."""
    work, step_s = layout.work, layout.step_s
    n_nodes = -(-work.n_ranks // hardware.ranks_per_node)
    tokens_per_s = config.train.batch_tokens / step_s
    hours, gpus = config.train.n_steps * step_s / 3600, work.n_ranks
    at_once = config.cluster.mode == "concurrent" and config.model.n_parameters is not None
    if at_once and not hardware.shared:
        tokens = min(config.train.tokens, config.data.tokens)
        harvest_s = tokens / harvest_tokens_per_s(layout, config, hardware)
        hours, gpus = max(hours, harvest_s / 3600), gpus + _harvest_gpus(layout, config)
    need = tokens_per_s * work.stored_row_bytes / n_nodes
    give = hardware.disk_bytes_per_s
    table = _table("training", "what", "is")
    bound = "" if layout.read_s <= 0.95 * step_s else ": bound by it"
    if bound and config.store.codec != "int8":
        bound += "; store.codec=int8 halves it"
    rows = {
        "tokens/s": f"{tokens_per_s:,.0f}",
        "reading": f"{need / 1e9:.3f} GB/s a node, the disks give {give / 1e9:.1f}{bound}",
        "duration": f"{hours:,.2f} h for {config.train.n_steps:,} steps, checkpoints not counted",
    }
    if hardware.price_per_hour:
        price = hours * gpus * hardware.price_per_hour
        each = f"{gpus} GPUs at ${hardware.price_per_hour:.2f} an hour"
        rows["cost"] = f"${price:,.0f}: {each}"
    rows["harvest"] = _harvest(layout, config, hardware)
    for key, value in rows.items():
        table.add_row(key, value)
    return table


def scaling_table(rows: Sequence[Simulated], grows: str) -> Table:
    """Weak scaling: a rank's share stays, `grows` grows with the ranks."""
    table = _table(
        f"simulated weak scaling ({grows} grow with the ranks)",
        *("ranks", "latent x data", "step ms", "efficiency", "failures", "with failures"),
    )
    for row in rows:
        table.add_row(
            f"{row.n_ranks:,}",
            row.mesh,
            f"{row.step_s * 1e3:.1f}",
            f"{row.step_efficiency:.1%}",
            str(row.failures),
            f"{row.run_efficiency:.1%}",
        )
    return table


def _harvest(layout: Layout, config: RunConfig, hardware: Hardware) -> str:
    if config.model.n_parameters is None:
        return "not planned: model.n_parameters is not set"
    tokens_per_s = harvest_tokens_per_s(layout, config, hardware)
    row_bytes = layout.work.stored_row_bytes * len(config.model.hookpoints)
    gpus = 1 if hardware.shared else _harvest_gpus(layout, config)
    what = "" if hardware.shared else f" on {gpus} GPUs (cluster.harvest_workers)"
    return (
        f"about {tokens_per_s:,.0f} tokens/s{what}, "
        f"{config.data.tokens / tokens_per_s / 3600:,.2f} h, writes "
        f"{tokens_per_s * row_bytes / 1e9:.2f} GB/s"
    )


def harvest_tokens_per_s(layout: Layout, config: RunConfig, hardware: Hardware) -> float:
    """A lower bound: the forward pass ends after the last hookpoint, this counts all layers.

    Args:
        layout: of the ranks.
        config: whose `model.n_parameters` is set.
        hardware: of one GPU, or this machine, which all harvest workers share.
    """
    assert config.model.n_parameters is not None
    gpus = 1 if hardware.shared else _harvest_gpus(layout, config)
    flops = hardware.peak_flops * config.plan.harvest_mfu * gpus
    return flops / (2 * config.model.n_parameters)


def _harvest_gpus(layout: Layout, config: RunConfig) -> int:
    """GPUs of all harvest workers: beside the ranks', or before them on at most as many."""
    wanted = config.cluster.harvest_workers * config.model.shards
    at_once = config.cluster.mode == "concurrent"
    return wanted if at_once else max(config.model.shards, min(wanted, layout.work.n_ranks))


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right")
    return table
