"""Shared reads: ranks that train on the same rows each read a part and exchange the parts.

The exchange runs in the device's process group and on its stream, so the host does not wait for it.
Before the exchange, the ranks confirm to one another, in a process group of the hosts, that each
rank has read its part. Otherwise a rank whose read failed would leave the others waiting in a
collective.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from itertools import pairwise
from typing import TypeVar

import torch
import torch.distributed as dist

from sae_core.distributed.mesh import Mesh
from sae_core.distributed.ranks import exchange_device, on_all_ranks
from sae_core.training.upload import Uploader

T = TypeVar("T")


@dataclass(frozen=True)
class SharedReads:
    """One rank's place among the ranks that train on the same rows. By default it reads alone.

    If there are fewer rows than ranks, every rank reads all of them.
    """

    rank: int = 0
    """Index of this rank in the group."""
    n_ranks: int = 1
    """Number of ranks in the group."""
    group: dist.ProcessGroup | None = None
    """Process group of the device, used for the rows."""
    host_group: dist.ProcessGroup | None = None
    """Host process group of the same ranks, used for errors. None if this rank reads alone."""
    uploader: Uploader | None = None
    """Moves rows from the host to the device of `group`. None if this rank reads alone."""

    @classmethod
    def for_mesh(cls, mesh: Mesh, timeout_s: float) -> SharedReads:
        """Return the shared reads of this rank's latent group. Collective over all ranks.

        Args:
            mesh: The mesh of ranks. The ranks of a latent group train on the same rows.
            timeout_s: Time limit of a collective between the hosts.
        """
        if mesh.n_latent == 1:
            return cls()
        groups = mesh.devices.mesh.tolist()
        timeout = timedelta(seconds=timeout_s)
        host_group, _ = dist.new_subgroups_by_enumeration(groups, timeout, backend="gloo")
        uploader = Uploader(exchange_device(mesh.latent_group))
        return cls(mesh.latent_rank, mesh.n_latent, mesh.latent_group, host_group, uploader)

    def part(self, lo: int, hi: int) -> tuple[int, int]:
        """Return the bounds of this rank's part of rows [lo, hi)."""
        starts = self._starts(hi - lo)
        return (lo + starts[self.rank], lo + starts[self.rank + 1]) if starts else (lo, hi)

    def read(self, read: Callable[[], T]) -> T:
        """Return the result of `read()` once it has succeeded on all ranks. Collective.

        Raises the same errors as `sae_core.distributed.ranks.on_all_ranks`.
        """
        return read() if self.host_group is None else on_all_ranks(read, self.host_group)

    def gather(self, rows: torch.Tensor, n_rows: int) -> torch.Tensor:
        """Return all ranks' parts in order, [n_rows, ...]. Collective.

        Args:
            rows: This rank's part of the rows, [n, ...].
            n_rows: Total number of rows in all parts.

        Returns:
            The rows, on the device on which `group` exchanges them. If this rank has read all rows
            itself, `rows` is returned unchanged.
        """
        starts = self._starts(n_rows)
        if not starts:
            return rows
        sizes = [stop - start for start, stop in pairwise(starts)]
        most = max(sizes)
        assert self.uploader is not None, "only a rank that reads alone has no uploader"
        (sent,) = self.uploader.upload([rows.contiguous()])
        if len(rows) < most:
            # Pad to the size of the largest part, because not every backend can gather parts of
            # unequal size.
            sent = torch.cat([sent, sent[: most - len(rows)]])
        parts = sent.new_empty((self.n_ranks * most, *rows.shape[1:]))
        # Send bytes, because not every backend supports bfloat16 or int8.
        dist.all_gather_into_tensor(_as_bytes(parts), _as_bytes(sent), self.group)
        if min(sizes) == most:
            return parts
        return torch.cat([part[:size] for part, size in zip(parts.split(most), sizes, strict=True)])

    def _starts(self, n_rows: int) -> list[int] | None:
        """Return each rank's start and the overall end, or None if every rank reads all rows."""
        if self.n_ranks == 1 or n_rows < self.n_ranks:
            return None
        return [n_rows * rank // self.n_ranks for rank in range(self.n_ranks + 1)]


def _as_bytes(rows: torch.Tensor) -> torch.Tensor:
    return rows.view(torch.uint8).flatten()
