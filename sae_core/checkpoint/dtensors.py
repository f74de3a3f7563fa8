"""View an SAE's tensors as `DTensor`s over the mesh, for loading a checkpoint.

On disk every tensor has its global shape [L, D], [L] or [D] under the name `<sae>.<name>`, whatever
the mesh or the ZeRO stage. Each rank reads the rows that it holds in its own mesh.
"""

from __future__ import annotations

import torch
from torch.distributed.tensor import DTensor, Replicate, Shard

from sae_core.distributed.mesh import Mesh
from sae_core.engine.deepspeed_engine import MOMENTS, SAEEngine


def weight_tensors(engine: SAEEngine) -> dict[str, torch.Tensor]:
    """Return parameters and buffers; sharded ones as DTensors that share their memory."""
    return {
        f"{engine.name}.{name}": _global(name, tensor, engine)
        for name, tensor in engine.sae.state_dict().items()
    }


def moment_tensors(
    engine: SAEEngine, moments: dict[str, dict[str, torch.Tensor]]
) -> dict[str, torch.Tensor]:
    """Return Adam's moments under the names of a checkpoint; sharded ones as DTensors.

    Args:
        engine: The engine of the SAE.
        moments: `{parameter: {moment: local tensor}}`.
    """
    return {
        f"{engine.name}.{parameter}.{moment}": _global(parameter, tensor[moment], engine)
        for parameter, tensor in moments.items()
        for moment in MOMENTS
    }


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """Return this rank's rows of a DTensor, or a plain tensor unchanged."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _global(name: str, local: torch.Tensor, engine: SAEEngine) -> torch.Tensor:
    if name not in engine.sae.row_names:
        return local
    return _shard_over_rows(local, engine.sae.config.n_latents, engine.sae.mesh)


def _shard_over_rows(local: torch.Tensor, n_rows: int, mesh: Mesh) -> DTensor:
    shape = torch.Size((n_rows, *local.shape[1:]))
    return DTensor.from_local(
        local.contiguous(),
        mesh.devices,
        (Replicate(), Shard(0)),
        run_check=False,
        shape=shape,
        stride=torch.empty(shape, device="meta").stride(),
    )
