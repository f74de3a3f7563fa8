"""An SAE's tensors as `DTensor`s over the mesh, which is all that a sharded save or load needs.

On disk a tensor is its global [L, D], [L] or [D] under `<sae>.<name>`, whatever the mesh or the
ZeRO stage; every rank reads the rows that its own mesh gives it.
"""

from __future__ import annotations

import torch
from torch.distributed.tensor import DTensor, Replicate, Shard

from sae_core.engine import MOMENTS, SAEEngine
from sae_core.mesh import Mesh

SHARDED = {"W_enc", "W_dec", "b_enc", "tokens_since_fired"}
"""Names of what is split over rows."""


def weight_tensors(engines: list[SAEEngine]) -> dict[str, torch.Tensor]:
    """Parameters and buffers of all SAEs, sharded ones as DTensors over this rank's memory."""
    return {
        f"{engine.name}.{name}": _global(name, tensor, engine)
        for engine in engines
        for name, tensor in engine.sae.state_dict().items()
    }


def moment_tensors(
    engines: list[SAEEngine], moments: dict[str, dict[str, dict[str, torch.Tensor]]]
) -> dict[str, torch.Tensor]:
    """Adam's moments `{sae: {parameter: {moment: local tensor}}}` as DTensors."""
    return {
        f"{engine.name}.{parameter}.{moment}": _global(parameter, tensor[moment], engine)
        for engine in engines
        for parameter, tensor in moments[engine.name].items()
        for moment in MOMENTS
    }


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's rows of a DTensor; a plain tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _global(name: str, local: torch.Tensor, engine: SAEEngine) -> torch.Tensor:
    if name not in SHARDED:
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
