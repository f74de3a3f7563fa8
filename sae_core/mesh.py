"""The `data x latent` mesh of trainer ranks, and the face of it that DeepSpeed wants to see.

Latent shards hold rows of the dictionary; data replicas hold the same rows and read other tokens.
Ranks of one latent group are neighbours (the fastest link), because every step exchanges
candidates and partial reconstructions among them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from sae_core.errors import ConfigError


def row_range(n_rows: int, shard: int, n_shards: int) -> tuple[int, int]:
    """Rows [start, stop) of one shard: ceil(n / shards) each, the last ones fewer.

    This is how `DTensor` splits with `Shard(0)`, so a checkpoint needs no layout of its own.
    """
    size = -(-n_rows // n_shards)
    return min(shard * size, n_rows), min((shard + 1) * size, n_rows)


@dataclass(frozen=True)
class Mesh:
    """One rank's place in the mesh."""

    devices: DeviceMesh
    latent_group: dist.ProcessGroup
    data_group: dist.ProcessGroup
    latent_rank: int
    n_latent: int
    data_rank: int
    n_data: int

    @classmethod
    def create(cls, device_type: str, latent: int, data: int) -> Mesh:
        """Builds the mesh over all ranks of the default process group (a collective call).

        Raises:
            ConfigError: `latent * data` is not the number of ranks.
        """
        world = dist.get_world_size()
        if latent * data != world:
            raise ConfigError(
                "parallel.latent x parallel.data",
                f"{latent} x {data} = {latent * data}",
                f"the number of ranks, {world}",
                "start that many ranks or change the mesh",
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

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0."""
        return self.latent_rank == 0 and self.data_rank == 0

    def rows(self, n_latents: int) -> tuple[int, int]:
        """Dictionary rows [start, stop) that this rank holds."""
        return row_range(n_latents, self.latent_rank, self.n_latent)


class MeshMPU:
    """The mesh as DeepSpeed's model-parallel unit.

    Without one the engine takes all ranks for data replicas and silently averages the shards.
    """

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh

    def get_model_parallel_rank(self) -> int:
        """What DeepSpeed calls model parallel is the latent dimension of the mesh."""
        return self.mesh.latent_rank

    def get_model_parallel_world_size(self) -> int:
        return self.mesh.n_latent

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self.mesh.latent_group

    def get_data_parallel_rank(self) -> int:
        return self.mesh.data_rank

    def get_data_parallel_world_size(self) -> int:
        return self.mesh.n_data

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self.mesh.data_group
