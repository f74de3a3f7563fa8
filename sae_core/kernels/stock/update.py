"""The fused row update in stock torch operations, in blocks of rows that fit in the cache.

This is exact Adam, not a lazy variant: rows with no gradient still decay their moments and are
updated.
"""

from __future__ import annotations

import torch

from sae_core.kernels.gradients import input_bias_gradient
from sae_core.kernels.interface import (
    AdamStep,
    Kernels,
    RowGradients,
    RowState,
    SparseGradient,
)
from sae_core.kernels.rounding import round_stochastically_, salt_of

_BLOCK_BYTES = 4 << 20
"""Size in bytes of a block's rows in each of the eight arrays involved.

With smaller blocks the overhead of the calls exceeds what the cache saves.
"""
_NORM_PIECE = 1024
"""Elements per partial sum: few enough for float32 accuracy, with few partial sums."""


class StockRowUpdate:
    """Update of dictionary rows in stock torch operations; see `RowUpdate`.

    Args:
        kernels: Kernels that sum the gradient's terms.
        gradient: Gradient of the global batch, with compact pairs.
        W_dec: [L, D] master rows, along which W_dec's gradient is projected (see `project`).
    """

    def __init__(self, kernels: Kernels, gradient: SparseGradient, W_dec: torch.Tensor) -> None:
        self.gradient = gradient
        self.rows = rows = kernels.row_gradients(*gradient.terms)
        self._square: torch.Tensor | None = None
        size = max(1, _BLOCK_BYTES // (W_dec.element_size() * W_dec.shape[1]))
        for latents, dW_dec in zip(rows.latents.split(size), rows.W_dec.split(size), strict=True):
            decoder = W_dec.index_select(0, latents)
            dW_dec.addcmul_((dW_dec * decoder).sum(1, keepdim=True), decoder, value=-1)

    def input_bias_gradient(self, W_enc: torch.Tensor) -> torch.Tensor:
        """See `RowUpdate.input_bias_gradient`."""
        return input_bias_gradient(self.gradient, W_enc)

    def square(self) -> torch.Tensor:
        """See `RowUpdate.square`."""
        if self._square is None:
            parts = (self.rows.W_enc, self.rows.W_dec, self.rows.b_enc)
            self._square = torch.stack([square_sum(part) for part in parts]).sum()
        return self._square

    def apply(self, state: RowState, adam: AdamStep) -> torch.Tensor:
        """See `RowUpdate.apply`; if any row's gradient is not finite, no row changes."""
        square = self.square()
        skip = torch.maximum(adam.skip, (~square.isfinite()).to(adam.skip.dtype))
        self._apply(state, adam._replace(skip=skip))
        return torch.where(adam.skip > 0, 0.0, square)

    def _apply(self, state: RowState, adam: AdamStep) -> None:
        n_rows, d_model = state.W_enc.shape
        size = max(1, min(_BLOCK_BYTES // (4 * d_model), n_rows))
        scratch = _Scratch(state, size)
        starts = list(range(0, n_rows, size))
        # The used latents are in ascending order, so each block's gradients are one slice.
        edges = torch.tensor([*starts, n_rows], device=self.rows.latents.device)
        cuts = torch.searchsorted(self.rows.latents, edges).tolist()
        for start, first, last in zip(starts, cuts[:-1], cuts[1:], strict=True):
            part = RowGradients(*(tensor[first:last] for tensor in self.rows))
            scratch.update(slice(start, min(start + size, n_rows)), part, state, adam)


class _Scratch:
    """Reused buffers for one block: dense gradients, and float32 versions of bfloat16 moments."""

    def __init__(self, state: RowState, size: int) -> None:
        rows = (state.W_enc, state.W_dec, state.b_enc)
        self.grads = [torch.empty_like(array[:size]) for array in rows]
        self.moments = [
            m.new_empty(m[:size].shape, dtype=torch.float32) if m.dtype == torch.bfloat16 else None
            for m in (*state.exp_avg, *state.exp_avg_sq)
        ]

    def update(self, span: slice, rows: RowGradients, state: RowState, adam: AdamStep) -> None:
        """Apply Adam to the rows of `span`; `rows` holds the gradients of the used rows in it."""
        n = span.stop - span.start
        grads = [grad[:n].zero_() for grad in self.grads]
        for grad, values in zip(grads, (rows.W_enc, rows.W_dec, rows.b_enc), strict=True):
            grad.index_copy_(0, rows.latents - span.start, values)
        parameters = [array[span] for array in (state.W_enc, state.W_dec, state.b_enc)]
        stored = [moment[span] for moment in (*state.exp_avg, *state.exp_avg_sq)]
        moments = [
            kept if full is None else full[:n].copy_(kept)
            for kept, full in zip(stored, self.moments, strict=True)
        ]
        torch._fused_adam_(
            parameters,
            grads,
            moments[:3],
            moments[3:],
            [],
            [adam.step] * len(parameters),
            lr=adam.lr,
            beta1=adam.beta1,
            beta2=adam.beta2,
            weight_decay=0.0,
            eps=adam.eps,
            amsgrad=False,
            maximize=False,
            grad_scale=adam.divisor,
            found_inf=adam.skip,
        )
        for i, (kept, moment) in enumerate(zip(stored, moments, strict=True)):
            if kept is not moment:
                first_row = state.first_latent + span.start
                round_stochastically_(kept, moment, first_row, salt_of(adam.step, i))
        renormalise_(parameters[1], adam.skip)
        if state.copies is not None:
            for copy, array in zip(state.copies, parameters[:2], strict=True):
                copy[span].copy_(array)


def square_sum(values: torch.Tensor) -> torch.Tensor:
    """Return the sum of squares of all elements, a scalar in at least float32.

    The sum is computed in pieces. On the CPU, torch's norm of a whole tensor is one running float32
    sum; its square was too small by a relative 7e-4 at 10 million elements and 4e-3 at 33 million.
    """
    flat = values.reshape(-1)
    dtype = torch.promote_types(values.dtype, torch.float32)
    whole = len(flat) // _NORM_PIECE * _NORM_PIECE
    pieces = flat[:whole].view(-1, _NORM_PIECE).norm(dim=1, dtype=dtype).square().sum()
    return pieces + flat[whole:].norm(dtype=dtype).square()


@torch.no_grad()
def renormalise_(W_dec: torch.Tensor, skipped: torch.Tensor) -> None:
    """Scale rows to unit norm, in place, unless the update was skipped.

    Args:
        W_dec: [n, D] decoder rows.
        skipped: Scalar, 1 if the update was skipped.
    """
    norm = W_dec.norm(dim=1, keepdim=True).clamp_min(1e-12)
    W_dec.mul_(torch.where(skipped > 0, 1.0, 1.0 / norm))
