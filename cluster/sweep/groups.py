"""Divide the cells of a sweep into groups that fit in memory and train concurrently."""

from __future__ import annotations

from dataclasses import replace

from activation_store import open_store
from cluster.planning.hardware import Hardware
from cluster.planning.local import planned_hardware
from cluster.planning.mesh_search import Layout, plan_layout
from cluster.training.store_checks import trained_array
from conf.schema.run import RunConfig
from foundation.errors import ConfigError

_SHARE_OF_MEMORY = 0.8
"""Share of the memory that the cells may fill. The rest allows for errors in the estimate."""
_ONCE = ("process", "loader", "loader, pinned")
"""Parts of a rank's memory that exist only once, however many SAEs train on the row stream."""


def training_groups(cells: dict[str, RunConfig], size: int) -> list[list[str]]:
    """Return the cells' names, divided into training groups of at most `size` cells.

    Each group makes a pass over the store.
    """
    names = list(cells)
    return [names[i : i + size] for i in range(0, len(names), size)]


def group_size(config: RunConfig, cells: dict[str, RunConfig]) -> int:
    """Return `sweep.saes_per_process` or, if it is null, the number of cells that fit in memory.

    Raises:
        ConfigError: If no cell fits, or the memory of the ranks cannot be determined on this
            machine.
    """
    if config.sweep.saes_per_process is not None:
        return config.sweep.saes_per_process
    hardware = planned_hardware(config, measure=False)
    planned = config.plan.hardware != "local"
    if hardware.memory_bytes <= 0 or (config.cluster.address is not None and not planned):
        raise ConfigError(
            "sweep.saes_per_process",
            None,
            "a number, because this machine cannot see the ranks' memory",
            "set a number, or set plan.hardware",
        )
    store = open_store(config.store.path)
    d_model = store.arrays[trained_array(config, store)]
    return cells_that_fit(cells, d_model, hardware)


def cells_that_fit(cells: dict[str, RunConfig], d_model: int, hardware: Hardware) -> int:
    """Return how many cells fit in memory at once, assuming all are as large as the largest.

    Args:
        cells: The cells, from `cells_of`.
        d_model: Width of the activations.
        hardware: The planned hardware. The memory of a GPU belongs to one rank. The memory of a
            machine without GPUs is shared by all ranks.

    Raises:
        ConfigError: If not even one cell fits.
    """
    # With memory of unknown size, the plan counts whole copies of checkpoints. If there were more
    # cells than that, training would wait for the files of each.
    roomy = replace(hardware, memory_bytes=0.0, host_memory_bytes=0.0)
    layouts = [plan_layout(cell, d_model, roomy, cell.parallel) for cell in cells.values()]
    ranks = 1 if layouts[0].work.on_gpu else layouts[0].work.n_ranks
    room = _SHARE_OF_MEMORY * hardware.memory_bytes / ranks - max(map(_held_once, layouts))
    each = max(map(_held_by_each, layouts))
    if room < each:
        largest = max(cell.sae.n_latents for cell in cells.values())
        raise ConfigError(
            "sweep.n_latents",
            largest,
            f"cells that fit in {_SHARE_OF_MEMORY:.0%} of {hardware.memory_bytes / 2**30:.1f} GiB, "
            "together with the process and the loader, but one cell takes "
            f"{each * ranks / 2**30:.1f} GiB",
            "use smaller cells, or set sweep.saes_per_process if this estimate is wrong",
        )
    return int(room // each)


def _parts(layout: Layout) -> dict[str, float]:
    """Return the parts of one rank's memory, in bytes, that count against the limit."""
    return layout.device if layout.work.on_gpu else layout.device | layout.host


def _held_once(layout: Layout) -> float:
    return sum(size for part, size in _parts(layout).items() if part in _ONCE)


def _held_by_each(layout: Layout) -> float:
    return sum(size for part, size in _parts(layout).items() if part not in _ONCE)
