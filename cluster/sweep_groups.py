"""Which cells of a sweep train together: as many as memory holds."""

from __future__ import annotations

from dataclasses import replace

from activation_store import open_store
from cluster.environment import memory_bytes
from cluster.plan import checkpoint_bytes_per_rank, memory_bytes_per_rank
from conf.schema import RunConfig
from sae_core.errors import ConfigError

_SHARE_OF_MEMORY = 0.8


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
    if config.train.device != "cpu":
        import torch

        if torch.cuda.is_available():
            memory = torch.cuda.get_device_properties(0).total_memory * config.parallel.n_ranks
            return _that_fit(config, cells, memory)
    available = memory_bytes()
    elsewhere = config.train.device == "cuda" or config.cluster.address is not None
    if elsewhere or available is None:
        raise ConfigError(
            "sweep.saes_per_process",
            None,
            "a number where the ranks' memory cannot be told from here",
        )
    return _that_fit(config, cells, available)


def _that_fit(config: RunConfig, cells: dict[str, RunConfig], available_bytes: int) -> int:
    store = open_store(config.store.path)
    d_model = store.arrays[config.sae.hookpoint or next(iter(store.arrays))]
    return cells_that_fit(cells, d_model, available_bytes)


def cells_that_fit(cells: dict[str, RunConfig], d_model: int, available_bytes: int) -> int:
    """How many of the largest cells a machine's memory holds with all ranks of their mesh.

    Args:
        cells: of `cells_of`.
        d_model: width of the activations.
        available_bytes: memory for all ranks.

    Raises:
        ConfigError: not even one.
    """
    ranks = next(iter(cells.values())).parallel.n_ranks
    first = next(iter(cells.values()))
    buffers = memory_bytes_per_rank(first, d_model) - _without_buffers(first, d_model)
    room = _SHARE_OF_MEMORY * available_bytes / ranks - buffers
    each = max(
        _without_buffers(cell, d_model) + checkpoint_bytes_per_rank(cell, d_model)
        for cell in cells.values()
    )
    if room < each:
        largest = max(cell.sae.n_latents for cell in cells.values())
        raise ConfigError(
            "sweep.n_latents",
            largest,
            f"cells that fit in {available_bytes / 2**30:.1f} GiB, one takes "
            f"{each * ranks / 2**30:.1f} GiB",
            "use smaller cells, or set sweep.saes_per_process if that is wrong",
        )
    return int(room // each)


def _without_buffers(cell: RunConfig, d_model: int) -> int:
    """The stream's buffers are there once, however many SAEs train on them."""
    store = replace(cell.store, buffer_tokens=0)
    return memory_bytes_per_rank(replace(cell, store=store), d_model)
