"""Copy a checkpoint to host memory between two steps, so that training need not wait for files."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from sae_core.distributed.mesh import Mesh, row_range
from sae_core.engine.deepspeed_engine import SAEEngine


class HostTensors(NamedTuple):
    """The tensors that this rank writes, named as in `sae_core.checkpoint.dtensors`."""

    weights: dict[str, torch.Tensor]
    """Parameters and buffers."""
    optimizer: dict[str, torch.Tensor]
    """Adam's moments."""


class HostCopy:
    """This rank's share of a checkpoint in host memory, in buffers that are reused by every save.

    Data replicas hold the same rows, so each of them copies and writes only a part. The rows of a
    global tensor are divided over the latent shards first, and then over the data replicas.

    Args:
        mesh: The trainer's mesh.
        device: Device of the parameters. Buffers for CUDA tensors are pinned.
        keep: Also copy tensors that are already in host memory. If False, the result may share
            memory with the parameters, and training must wait until it is written.
    """

    def __init__(self, mesh: Mesh, device: torch.device, keep: bool) -> None:
        self._mesh = mesh
        self._device = device
        self._keep = keep
        ranks = torch.arange(mesh.n_data * mesh.n_latent).view(mesh.n_data, mesh.n_latent)
        self._devices = DeviceMesh("cpu", ranks.T.contiguous())
        self._buffers: dict[str, torch.Tensor] = {}

    def take(self, engine: SAEEngine) -> HostTensors:
        """Copy weights, buffers and moments to the host; collective under ZeRO 1.

        Row-sharded tensors become DTensors over this rank's rows; all other tensors are whole.
        """
        taken = HostTensors({}, {})
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
        if name not in engine.sae.row_names:
            taken[key] = self._to_host(key, tensor)
            return
        start, stop = row_range(len(tensor), self._mesh.data_rank, self._mesh.n_data)
        if start == stop:
            return  # fewer rows than replicas: earlier replicas have them all
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
    """Yield (parameter, moment, local rows), one parameter at a time.

    ZeRO 1 gathers full moments on every access, so the moments of only one parameter are held at a
    time.
    """
    for name in engine.parameter_names:
        for moment, tensor in engine.moments_of(name).items():
            yield name, moment, tensor
