"""The `data x latent` mesh of trainer ranks, and the interface to it that DeepSpeed needs.

Each latent shard holds some rows of the dictionary. Data replicas hold the same rows and read
different tokens. Ranks of one latent group exchange candidates and partial reconstructions in every
step. They have consecutive numbers, so that they share the fastest link.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from foundation.errors import ConfigError


def row_range(n_rows: int, shard: int, n_shards: int) -> tuple[int, int]:
    """Return the rows [start, stop) of one shard: ceil(n / shards), or fewer in the last ones.

    `DTensor` splits the same way with `Shard(0)`, so a checkpoint needs no separate layout.
    """
    size = -(-n_rows // n_shards)
    return min(shard * size, n_rows), min((shard + 1) * size, n_rows)


@dataclass(frozen=True)
class Mesh:
    """One rank's place in the mesh."""

    devices: DeviceMesh
    """The whole mesh, with dimensions (data, latent)."""
    latent_group: dist.ProcessGroup
    """The ranks that together hold one copy of the dictionary."""
    data_group: dist.ProcessGroup
    """The ranks that hold the same dictionary rows."""
    latent_rank: int
    """This rank's index in its latent group."""
    n_latent: int
    """Number of dictionary shards."""
    data_rank: int
    """This rank's index in its data group."""
    n_data: int
    """Number of data replicas."""

    @classmethod
    def create(cls, device_type: str, latent: int, data: int) -> Mesh:
        """Build the mesh over all ranks of the default process group; collective.

        Args:
            device_type: "cpu" or "cuda".
            latent: Number of dictionary shards.
            data: Number of data replicas.

        Raises:
            ConfigError: If `latent * data` is not the number of ranks.
        """
        world = dist.get_world_size()
        if latent * data != world:
            raise ConfigError(
                "parallel.latent x parallel.data",
                f"{latent} x {data} = {latent * data}",
                f"the number of ranks, {world}",
                f"start {latent * data} ranks, or change parallel.latent or parallel.data",
            )
        devices = init_device_mesh(device_type, (data, latent), mesh_dim_names=("data", "latent"))
        return cls(
            devices=devices,
            latent_group=devices.get_group("latent"),
            data_group=devices.get_group("data"),
            latent_rank=devices.get_local_rank("latent"),
            n_latent=latent,
            data_rank=devices.get_local_rank("data"),
            n_data=data,
        )

    def rows(self, n_latents: int) -> tuple[int, int]:
        """Return the dictionary rows [start, stop) that this rank holds."""
        return row_range(n_latents, self.latent_rank, self.n_latent)


class MeshMPU:
    """The mesh as DeepSpeed's model-parallel unit (MPU).

    DeepSpeed's "model parallel" dimension is our latent dimension. Without an MPU the engine would
    treat all ranks as data replicas and silently average the shards.
    """

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh

    def get_model_parallel_rank(self) -> int:
        """Return the rank in the latent group."""
        return self.mesh.latent_rank

    def get_model_parallel_world_size(self) -> int:
        """Return the number of latent shards."""
        return self.mesh.n_latent

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        """Return the latent group."""
        return self.mesh.latent_group

    def get_data_parallel_rank(self) -> int:
        """Return the rank in the data group."""
        return self.mesh.data_rank

    def get_data_parallel_world_size(self) -> int:
        """Return the number of data replicas."""
        return self.mesh.n_data

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        """Return the data group."""
        return self.mesh.data_group
