"""The copy of a checkpoint on the host: taken between two steps, written while training goes on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from sae_core.checkpoint.tensors import SHARDED
from sae_core.engine import SAEEngine
from sae_core.mesh import Mesh, row_range


class HostTensors(NamedTuple):
    """What this rank writes; the names are those of `sae_core.checkpoint.tensors`."""

    weights: dict[str, torch.Tensor]
    optimizer: dict[str, torch.Tensor]


class HostCopy:
    """This rank's share of a checkpoint in host memory, in buffers that every save uses again.

    Replicas hold the same rows, so each copies and writes its own part of them: row r of the
    global tensor lies with latent shard first, then with data replica.

    Args:
        mesh: of the training.
        device: where the parameters are; buffers for CUDA are pinned.
        keep: copy also what lies in host memory already. Without, the tensors may be the
            parameters' own memory, and training must wait until they are written.
    """

    def __init__(self, mesh: Mesh, device: torch.device, keep: bool) -> None:
        self._mesh, self._device, self._keep = mesh, device, keep
        ranks = torch.arange(mesh.n_data * mesh.n_latent).view(mesh.n_data, mesh.n_latent)
        self._devices = DeviceMesh("cpu", ranks.T.contiguous())
        self._buffers: dict[str, torch.Tensor] = {}

    def take(self, engines: list[SAEEngine]) -> HostTensors:
        """Weights, buffers and moments of all SAEs as they are now; collective under ZeRO 1.

        Row-sharded tensors come as DTensors over this rank's rows, others whole.
        """
        taken = HostTensors({}, {})
        for engine in engines:
            for name, tensor in engine.sae.state_dict().items():
                self._add(taken.weights, name, f"{engine.name}.{name}", tensor, engine)
            for name, moment, tensor in _moments(engine):
                key = f"{engine.name}.{name}.{moment}"
                self._add(taken.optimizer, name, key, tensor, engine)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return taken

    def _add(
        self,
        taken: dict[str, torch.Tensor],
        name: str,
        key: str,
        tensor: torch.Tensor,
        engine: SAEEngine,
    ) -> None:
        if name not in SHARDED:
            taken[key] = self._to_host(key, tensor)
            return
        start, stop = row_range(len(tensor), self._mesh.data_rank, self._mesh.n_data)
        if start == stop:
            return  # fewer rows than replicas: the ones before have them all
        shape = torch.Size((engine.sae.config.n_latents, *tensor.shape[1:]))
        taken[key] = DTensor.from_local(
            self._to_host(key, tensor[start:stop]),
            self._devices,
            (Shard(0), Shard(0)),
            run_check=False,
            shape=shape,
            stride=torch.empty(shape, device="meta").stride(),
        )

    def _to_host(self, key: str, tensor: torch.Tensor) -> torch.Tensor:
        if not self._keep and tensor.device.type == "cpu":
            return tensor.detach().contiguous()
        buffer = self._buffers.get(key)
        if buffer is None:
            pin = tensor.device.type == "cuda"
            buffer = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=pin)
            self._buffers[key] = buffer
        return buffer.copy_(tensor.detach(), non_blocking=True)


def _moments(engine: SAEEngine) -> Iterator[tuple[str, str, torch.Tensor]]:
    """(parameter, moment, local rows), one parameter at a time: ZeRO 1 gathers each anew."""
    for name in engine.parameter_names:
        for moment, tensor in engine.moments_of(name).items():
            yield name, moment, tensor
