"""Ranks that train on the same rows read them once: each reads its part, all exchange the parts.

The exchange is on the device's group and its stream, so the host does not wait for it. Whether
every rank has its part is told on a group of the host's own: a rank that cannot read would
otherwise leave the others waiting in a collective.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from activation_store.errors import StoreError
from sae_core.mesh import Mesh

T = TypeVar("T")


@dataclass(frozen=True)
class RowShare:
    """One rank's place among those that train on the same rows; the default is alone.

    Fewer rows than ranks are read by each.
    """

    rank: int = 0
    n_ranks: int = 1
    group: dist.ProcessGroup | None = None
    """Of the device."""
    host_group: dist.ProcessGroup | None = None
    """Of the same ranks, on the host."""

    @classmethod
    def of(cls, mesh: Mesh, timeout_s: float) -> RowShare:
        """The latent group of this rank; a collective call of all ranks."""
        if mesh.n_latent == 1:
            return cls()
        groups = mesh.devices.mesh.tolist()
        timeout = timedelta(seconds=timeout_s)
        host_group, _ = dist.new_subgroups_by_enumeration(groups, timeout, backend="gloo")
        return cls(mesh.latent_rank, mesh.n_latent, mesh.latent_group, host_group)

    def part(self, lo: int, hi: int) -> tuple[int, int]:
        """This rank's part of rows [lo, hi)."""
        starts = self._starts(hi - lo)
        return (lo + starts[self.rank], lo + starts[self.rank + 1]) if starts else (lo, hi)

    def read(self, read: Callable[[], T]) -> T:
        """What `read` gives on this rank, once it has on all; collective.

        Raises:
            StoreError: on every rank what one of them raised.
            RuntimeError: where another rank raised anything else: as when a collective breaks,
                this rank is not at fault.
        """
        if self.host_group is None:
            return read()
        error: Exception | None = None
        try:
            found = read()
        except Exception as raised:  # noqa: BLE001 - raised again below
            error = raised
        failed = torch.tensor(int(error is not None))
        dist.all_reduce(failed, dist.ReduceOp.MAX, self.host_group)
        if failed:
            self._raise(error)
        return found

    def gather(self, rows: torch.Tensor, n_rows: int) -> torch.Tensor:
        """[n_rows, ...]: all ranks' parts, in their order; collective, on the device of `rows`.

        Args:
            rows: [n, ...] this rank's part of them.
            n_rows: of all parts.
        """
        starts = self._starts(n_rows)
        if not starts:
            return rows
        sizes = [stop - start for start, stop in zip(starts[:-1], starts[1:], strict=True)]
        most = max(sizes)
        sent = rows.contiguous()
        if len(rows) < most:  # a collective of equal parts is the one that all backends have
            sent = torch.cat([sent, sent[: most - len(rows)]])
        parts = sent.new_empty((self.n_ranks * most, *rows.shape[1:]))
        # As bytes: not every backend knows bfloat16 or int8.
        dist.all_gather_into_tensor(_as_bytes(parts), _as_bytes(sent), self.group)
        if min(sizes) == most:
            return parts
        return torch.cat([part[:size] for part, size in zip(parts.split(most), sizes, strict=True)])

    def _starts(self, n_rows: int) -> list[int] | None:
        """Where the parts of `n_rows` rows begin, and the end; None if each rank reads all."""
        if self.n_ranks == 1 or n_rows < self.n_ranks:
            return None
        return [n_rows * rank // self.n_ranks for rank in range(self.n_ranks + 1)]

    def _raise(self, error: Exception | None) -> None:
        known = error is None or isinstance(error, StoreError)
        told: list[Exception | None] = [None] * self.n_ranks
        sent = error if known else RuntimeError(f"{type(error).__name__}: {error}")
        dist.all_gather_object(told, sent, group=self.host_group)
        if error is not None:
            raise error
        rank, met = next((rank, one) for rank, one in enumerate(told) if one is not None)
        met.add_note(f"Met by rank {rank} of the latent group.")
        raise met


def _as_bytes(rows: torch.Tensor) -> torch.Tensor:
    return rows.view(torch.uint8).flatten()
