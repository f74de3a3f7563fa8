"""Where batches come from: the one interface between stored activations and the trainer."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch


class Batch(NamedTuple):
    """One replica's slice of a global batch."""

    x: torch.Tensor
    """[B, D] raw activations, bfloat16 or float32, on the host or the trainer's device."""
    target: torch.Tensor | None
    """[B, d_out] what a transcoder reconstructs; None for an autoencoder: `x` itself."""
    first_row: int
    """Index of the first row in the stream of all epochs."""


class ActivationSource(Protocol):
    """A deterministic, seekable stream of batches: batch i is the same at every call."""

    d_in: int
    d_out: int
    identity: str
    """Changes whenever batch i would hold other rows, but for the seed."""

    @property
    def position(self) -> int:
        """Index of the next batch."""
        ...

    def sample(self, n: int) -> torch.Tensor:
        """The first `n` rows of the stream (fewer if there are fewer), [n, d_in]; moves nothing."""
        ...

    def seek(self, position: int) -> None:
        """Makes batch `position` the next one."""
        ...

    def next(self) -> Batch:
        """The batch at `position`, which moves on by one."""
        ...
