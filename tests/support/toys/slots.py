"""A toy kernel body that keeps pairs in slots like the Triton kernels, but runs on any machine.

Training with it takes every path that exists for asynchronous kernels: slots instead of compact
pairs, an auxiliary path that always runs, an exchange of slots between replicas, and a learning
rate in a tensor.
"""

from __future__ import annotations

import torch

from sae_core.kernels import (
    EMPTY,
    AdamStep,
    Kernels,
    RowGradients,
    RowState,
    RowUpdate,
    SparseGradient,
    SparseLatents,
)
from sae_core.kernels.registry import KernelBody
from sae_core.kernels.stock.body import StockKernels
from sae_core.kernels.stock.update import StockRowUpdate


class SlottedKernels(StockKernels):
    """Stock kernels that are asynchronous in name; they drop empty slots before every operation."""

    name = "slotted"
    asynchronous = True

    def decode(self, active: SparseLatents, W_dec: torch.Tensor) -> torch.Tensor:
        return super().decode(_packed(active)[0], W_dec)

    def decoder_dot(
        self, vectors: torch.Tensor, active: SparseLatents, matrix: torch.Tensor
    ) -> torch.Tensor:
        pairs, used = _packed(active)
        dots = super().decoder_dot(vectors, pairs, matrix)
        # Whatever is in empty slots must not matter.
        return dots.new_full((len(active.latents),), float("nan")).index_copy_(0, used, dots)

    def row_gradients(
        self, active: SparseLatents, dvalues: torch.Tensor, x: torch.Tensor, error: torch.Tensor
    ) -> RowGradients:
        pairs, used = _packed(active)
        return super().row_gradients(pairs, dvalues[used], x, error)

    def row_update(self, gradient: SparseGradient, W_dec: torch.Tensor) -> RowUpdate:
        pairs, used = _packed(gradient.pairs)
        packed = gradient._replace(pairs=pairs, dvalues=gradient.dvalues[used])
        return _Update(self, packed, W_dec)


class _Update(StockRowUpdate):
    def apply(self, state: RowState, adam: AdamStep) -> torch.Tensor:
        assert isinstance(adam.lr, torch.Tensor), "the learning rate must be on the device"
        return super().apply(state, adam._replace(lr=float(adam.lr)))


def _packed(active: SparseLatents) -> tuple[SparseLatents, torch.Tensor]:
    """Return the pairs without empty slots, and the slots that they were in."""
    used = (active.latents != EMPTY).nonzero().squeeze(1)
    counts = active.ends - active.offsets
    ends = counts.cumsum(0)
    assert int(ends[-1]) == len(used), "slots and ends disagree"
    pairs = SparseLatents(
        active.rows[used], active.latents[used], active.values[used], ends - counts, ends
    )
    return pairs, used


def build_slotted(compute_dtype: torch.dtype, tf32: bool, prefilter: str) -> Kernels:
    """Build `SlottedKernels`."""
    return SlottedKernels(compute_dtype)


SLOTTED = KernelBody("tests.support.toys.slots:build_slotted")
