"""The interface between stored activations and the trainer."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch


class Batch(NamedTuple):
    """One replica's slice of a global batch."""

    x: torch.Tensor
    """[B, D] raw activations, bfloat16 or float32."""
    target: torch.Tensor | None
    """[B, d_out] target of a transcoder; None for an autoencoder, whose target is `x`."""
    first_row: int
    """Index of the first row in the stream, counted over all epochs."""


class ActivationSource(Protocol):
    """A deterministic, seekable stream of batches: batch i is the same on every call.

    A source returns tensors on the device where it gathers them, usually the host. Only
    `SharedSource` moves them to the trainers' device, once for all trainers. It keeps a batch in
    pinned memory alive until the copy to the device is complete.
    """

    d_in: int
    """Width of `Batch.x`."""
    d_out: int
    """Width of `Batch.target`; equal to `d_in` for an autoencoder."""
    identity: str
    """Identifies the content of the batches: it differs if batch i would hold other rows. It does
    not cover the seed, which is compared separately."""

    @property
    def position(self) -> int:
        """Index of the next batch."""
        ...

    def sample(self, n: int) -> torch.Tensor:
        """Return the first rows of the stream, without changing `position`.

        Returns:
            [n, d_in] raw activations; fewer than `n` rows if the stream is shorter.
        """
        ...

    def seek(self, position: int) -> None:
        """Make `position` the next batch."""
        ...

    def next(self) -> Batch:
        """Return the batch at `position` and advance by one."""
        ...
