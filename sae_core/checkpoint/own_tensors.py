"""The tensors, or rows of tensors, that this rank writes to a checkpoint.

Data replicas hold the same rows, so each of them writes only a part. The rows of a global tensor
are divided over the latent shards first, and then over the data replicas. Rank 0 writes the tensors
that are the same on all ranks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch

from sae_core.checkpoint.folder import OPTIMIZER, WEIGHTS
from sae_core.distributed.mesh import Mesh, row_range
from sae_core.engine.deepspeed_engine import MOMENTS, SAEEngine


class OwnTensor(NamedTuple):
    """Consecutive rows of a tensor of the checkpoint, or a whole tensor, that this rank writes."""

    folder: str
    """`weights` or `optimizer`."""
    key: str
    """Name in the checkpoint, `<sae>.<name>` or `<sae>.<name>.<moment>`."""
    dtype: torch.dtype
    shape: tuple[int, ...]
    """Shape of these rows; `()` for a scalar."""
    first_row: int
    """Index of the first row in the whole tensor; 0 for a scalar."""

    @property
    def n_bytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def own_tensors(engine: SAEEngine, mesh: Mesh) -> list[OwnTensor]:
    """List what this rank writes, in the order of `contents`, without looking at any value."""
    found = []
    for name, tensor in _weights(engine):
        key = f"{engine.name}.{name}"
        found.append(_own(engine, mesh, WEIGHTS, name, key, tensor.dtype))
    for name in _parameters(engine):
        dtype = engine.moment_dtype(name)
        for moment in MOMENTS:
            key = f"{engine.name}.{name}.{moment}"
            found.append(_own(engine, mesh, OPTIMIZER, name, key, dtype))
    return [own for own in found if own is not None]


def contents(engine: SAEEngine, mesh: Mesh) -> Iterator[tuple[OwnTensor, torch.Tensor]]:
    """Yield each of `own_tensors` with its value on the device; collective under ZeRO 1.

    ZeRO 1 gathers full moments on every access, so the moments of only one parameter are held at a
    time, and every rank asks for those of all parameters, in the same order.
    """
    for name, tensor in _weights(engine):
        key = f"{engine.name}.{name}"
        own = _own(engine, mesh, WEIGHTS, name, key, tensor.dtype)
        if own is not None:
            yield own, _own_rows(engine, mesh, name, tensor)
    for name in _parameters(engine):
        for moment, tensor in engine.moments_of(name).items():
            key = f"{engine.name}.{name}.{moment}"
            own = _own(engine, mesh, OPTIMIZER, name, key, tensor.dtype)
            if own is not None:
                yield own, _own_rows(engine, mesh, name, tensor)


def _weights(engine: SAEEngine) -> list[tuple[str, torch.Tensor]]:
    """Return parameters and persistent buffers, the small ones first."""
    return sorted(engine.sae.state_dict().items(), key=lambda item: (item[1].dim(), item[0]))


def _parameters(engine: SAEEngine) -> list[str]:
    """Return the names of the parameters, the small ones first."""
    return sorted(
        engine.parameter_names, key=lambda name: (engine.sae.get_parameter(name).dim(), name)
    )


def _own(
    engine: SAEEngine, mesh: Mesh, folder: str, name: str, key: str, dtype: torch.dtype
) -> OwnTensor | None:
    """Return what this rank writes of a parameter, buffer or moment; None if nothing."""
    shape = engine.sae.state_dict()[name].shape
    if name not in engine.sae.row_names:
        is_first = mesh.latent_rank == mesh.data_rank == 0
        return OwnTensor(folder, key, dtype, tuple(shape), 0) if is_first else None
    start, stop = row_range(shape[0], mesh.data_rank, mesh.n_data)
    if start == stop:
        return None  # fewer rows than replicas: earlier replicas have them all
    first_row = engine.sae.first_latent + start
    return OwnTensor(folder, key, dtype, (stop - start, *shape[1:]), first_row)


def _own_rows(engine: SAEEngine, mesh: Mesh, name: str, tensor: torch.Tensor) -> torch.Tensor:
    if name not in engine.sae.row_names:
        return tensor
    start, stop = row_range(len(tensor), mesh.data_rank, mesh.n_data)
    return tensor[start:stop]
