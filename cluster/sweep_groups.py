"""Which cells of a sweep train together: as many as memory holds."""

from __future__ import annotations

from activation_store import open_store
from cluster.plan import planned_hardware
from cluster.planning.hardware import Hardware
from cluster.planning.layout import Layout, plan_layout
from conf.schema import RunConfig
from sae_core.errors import ConfigError

_SHARE_OF_MEMORY = 0.8
_ONCE = ("process", "loader", "loader, pinned")
"""Parts of a rank's memory that are there once, however many SAEs train on the stream."""


def cohorts(cells: dict[str, RunConfig], size: int) -> list[list[str]]:
    """The names, in groups of at most `size` that train together: a pass over the stream each."""
    names = list(cells)
    return [names[i : i + size] for i in range(0, len(names), size)]


def group_size(config: RunConfig, cells: dict[str, RunConfig]) -> int:
    """`sweep.saes_per_process`, or as many cells as fit in memory.

    Raises:
        ConfigError: not even one fits, or the memory of the ranks cannot be told from here.
    """
    if config.sweep.saes_per_process is not None:
        return config.sweep.saes_per_process
    hardware = planned_hardware(config, measure=False)
    planned = config.plan.hardware != "local"
    if hardware.memory_bytes <= 0 or (config.cluster.address is not None and not planned):
        raise ConfigError(
            "sweep.saes_per_process",
            None,
            "a number, or plan.hardware, where the ranks' memory cannot be told from here",
        )
    store = open_store(config.store.path)
    d_model = store.arrays[config.sae.hookpoint or next(iter(store.arrays))]
    return cells_that_fit(cells, d_model, hardware)


def cells_that_fit(cells: dict[str, RunConfig], d_model: int, hardware: Hardware) -> int:
    """How many of the largest cells the memory holds at once.

    Args:
        cells: of `cells_of`.
        d_model: width of the activations.
        hardware: a GPU's memory is one rank's, that of a machine without is all ranks'.

    Raises:
        ConfigError: not even one.
    """
    layouts = [plan_layout(cell, d_model, hardware, cell.parallel) for cell in cells.values()]
    ranks = 1 if layouts[0].work.on_gpu else layouts[0].work.n_ranks
    room = _SHARE_OF_MEMORY * hardware.memory_bytes / ranks - max(map(_held_once, layouts))
    each = max(map(_held_by_each, layouts))
    if room < each:
        largest = max(cell.sae.n_latents for cell in cells.values())
        raise ConfigError(
            "sweep.n_latents",
            largest,
            f"cells that fit in {hardware.memory_bytes / 2**30:.1f} GiB, one takes "
            f"{each * ranks / 2**30:.1f} GiB",
            "use smaller cells, or set sweep.saes_per_process if that is wrong",
        )
    return int(room // each)


def _parts(layout: Layout) -> dict[str, float]:
    """Of one rank, in the memory that is limited."""
    return layout.device if layout.work.on_gpu else layout.device | layout.host


def _held_once(layout: Layout) -> float:
    return sum(size for part, size in _parts(layout).items() if part in _ONCE)


def _held_by_each(layout: Layout) -> float:
    return sum(size for part, size in _parts(layout).items() if part not in _ONCE)
