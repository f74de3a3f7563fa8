"""Tables in which the plan is printed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from rich.table import Table

from activation_store.codecs.registry import CODECS
from activation_store.format.header import DTYPES
from cluster.planning.hardware import Hardware, shared_among
from cluster.planning.links import collectives, crosses_nodes, seconds
from cluster.planning.mesh_search import Layout
from cluster.planning.step_buffers import gpu_buffers, peak
from cluster.planning.work import stored_row_bytes
from conf.schema.run import RunConfig
from foundation.units import bytes_text


class Simulated(NamedTuple):
    """One row of the weak-scaling table."""

    n_ranks: int
    """Number of ranks."""
    mesh: str
    """Mesh as text, latent x data."""
    step_s: float
    """Seconds of a step, including stragglers."""
    step_efficiency: float
    """Useful computation as a share of the step's time."""
    failures: int
    """Failures in the whole run."""
    run_efficiency: float
    """Useful computation as a share of the run's time, including failures and checkpoints."""


def memory_table(layout: Layout) -> Table:
    """Return the memory of a rank by part."""
    where = "device" if layout.work.on_gpu else "process"
    table = _table("memory per rank", "part", "size", "where")
    for part, size in layout.device.items():
        table.add_row(part, bytes_text(size), where)
    table.add_row("peak", bytes_text(layout.device_total), where, style="bold")
    for part, size in layout.host.items():
        table.add_row(part, bytes_text(size), "host")
    return table


def step_table(layout: Layout) -> Table:
    """Return the time of a step by phase, in milliseconds."""
    table = _table("one step", "part", "ms", "share")
    total = sum(phase.seconds for phase in layout.phases)
    for phase in layout.phases:
        what = phase.what if phase.group is None else f"{phase.what} ({phase.group} group)"
        table.add_row(what, f"{phase.seconds * 1e3:.3f}", f"{phase.seconds / total:.1%}")
    table.add_row("step", f"{total * 1e3:.2f}", "", style="bold")
    table.add_row("reading a batch (overlapped)", f"{layout.read_s * 1e3:.2f}", "")
    return table


def traffic_table(layout: Layout, hardware: Hardware) -> Table:
    """Return the bytes that a rank sends in a step, by collective and link."""
    here = shared_among(hardware, min(layout.work.n_ranks, hardware.ranks_per_node))
    table = _table("traffic per rank and step", "data", "collective", "MiB", "link", "ms")
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
    """Return the layouts that the search compared, one per row."""
    columns = ("gradients sent", "memory per rank", "fits", "step ms", "tokens/s")
    table = _table("layouts", "latent x data", *columns)
    for layout in found:
        work = layout.work
        table.add_row(
            f"{work.latent} x {work.data}",
            layout.exchange,
            bytes_text(layout.device_total),
            "yes" if layout.fits else "no",
            f"{layout.step_s * 1e3:.1f}",
            f"{work.rows * work.data / layout.step_s:,.0f}",
        )
    return table


def peak_table(layout: Layout) -> Table:
    """Return the arrays that a step on a GPU holds at its peak, largest first."""
    moment, held = peak(gpu_buffers(layout.work))
    where = moment.name.lower().replace("_", " ")
    table = _table(f"arrays of a step at its peak ({where})", "array", "size")
    for what, n_bytes in sorted(held.items(), key=lambda item: -item[1]):
        if n_bytes >= 0.001 * sum(held.values()):
            table.add_row(what, bytes_text(n_bytes))
    return table


def run_table(
    layout: Layout, config: RunConfig, hardware: Hardware, widths: Sequence[int] = ()
) -> Table:
    """Return duration, read bandwidth and cost of training.

    In concurrent mode on GPUs, duration and cost include the concurrent harvest.

    Args:
        layout: The planned mesh.
        config: Config of the run.
        hardware: Hardware of one rank.
        widths: Width of each hookpoint's rows; if empty, that of the trained one for all.
    """
    widths = widths or [layout.work.d_model] * len(config.model.hookpoints)
    work, step_s = layout.work, layout.step_s
    n_nodes = -(-work.n_ranks // hardware.ranks_per_node)
    tokens_per_s = config.train.batch_tokens / step_s
    hours = config.train.n_steps * step_s / 3600
    gpus = work.n_ranks
    at_once = config.cluster.mode == "concurrent" and config.model.n_parameters is not None
    if at_once and not hardware.shared:
        tokens = min(config.train.tokens, config.data.tokens)
        harvest_s = tokens / harvest_tokens_per_s(layout, config, hardware)
        hours = max(hours, harvest_s / 3600)
        gpus += _harvest_gpus(layout, config)
    need = tokens_per_s * work.stored_row_bytes / n_nodes
    give = hardware.disk_bytes_per_s
    table = _table("training", "quantity", "value")
    bound = "" if layout.read_s <= 0.95 * step_s else ", which limits training"
    if bound:
        bound += _smaller_codec(config, work.d_model)
    rows = {
        "tokens/s": f"{tokens_per_s:,.0f}",
        "reading": f"{need / 1e9:.3f} GB/s per node, of {give / 1e9:.1f} GB/s from the disks"
        + bound,
        "duration": f"{hours:,.2f} h for {config.train.n_steps:,} steps, without checkpoints",
    }
    if hardware.price_per_hour:
        price = hours * gpus * hardware.price_per_hour
        each = f"{gpus} GPUs at ${hardware.price_per_hour:.2f} per hour"
        rows["cost"] = f"${price:,.0f}: {each}"
    rows["harvest"] = _harvest(layout, config, hardware, widths)
    for key, value in rows.items():
        table.add_row(key, value)
    return table


def _smaller_codec(config: RunConfig, d_model: int) -> str:
    """Suggest the codec with the fewest bytes per row. Empty if it is the current one."""
    dtype = DTYPES[config.store.dtype]
    row_bytes = {name: codec.row_bytes(dtype, d_model) for name, codec in CODECS.items()}
    least = min(row_bytes, key=row_bytes.__getitem__)
    share = row_bytes[least] / row_bytes[config.store.codec]
    return f"; store.codec={least} needs {share:.0%} of the bytes" if share < 1 else ""


def scaling_table(rows: Sequence[Simulated], grows: str) -> Table:
    """Return simulated weak scaling. `grows` names what grows in proportion to the ranks."""
    table = _table(
        f"simulated weak scaling (in proportion to the ranks: {grows})",
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


def _harvest(layout: Layout, config: RunConfig, hardware: Hardware, widths: Sequence[int]) -> str:
    if config.model.n_parameters is None:
        return "not planned, because model.n_parameters is not set"
    tokens_per_s = harvest_tokens_per_s(layout, config, hardware)
    row_bytes = sum(stored_row_bytes(config, width) for width in widths)
    gpus = 1 if hardware.shared else _harvest_gpus(layout, config)
    what = "" if hardware.shared else f" on {gpus} GPUs (cluster.harvest_workers)"
    return (
        f"about {tokens_per_s:,.0f} tokens/s{what}, "
        f"{config.data.tokens / tokens_per_s / 3600:,.2f} h, writing "
        f"{tokens_per_s * row_bytes / 1e9:.2f} GB/s"
    )


def harvest_tokens_per_s(layout: Layout, config: RunConfig, hardware: Hardware) -> float:
    """Return the total tokens per second of all harvest workers.

    The result is a lower bound, because it counts all layers although the forward pass ends after
    the last hookpoint.

    Args:
        layout: Layout of the trainer ranks.
        config: Config of the run; `model.n_parameters` must be set.
        hardware: One GPU, or this machine, which all harvest workers share.
    """
    assert config.model.n_parameters is not None
    gpus = 1 if hardware.shared else _harvest_gpus(layout, config)
    flops = hardware.peak_flops * config.plan.harvest_mfu * gpus
    return flops / (2 * config.model.n_parameters)


def _harvest_gpus(layout: Layout, config: RunConfig) -> int:
    """Return the total number of GPUs of all harvest workers.

    In concurrent mode, these GPUs are additional to those of the trainer ranks. Otherwise the
    harvest runs before training, on at most as many GPUs as training uses (but enough for one
    worker).
    """
    wanted = config.cluster.harvest_workers * config.model.shards
    at_once = config.cluster.mode == "concurrent"
    return wanted if at_once else max(config.model.shards, min(wanted, layout.work.n_ranks))


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right")
    return table
