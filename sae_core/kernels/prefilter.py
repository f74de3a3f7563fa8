"""Exact TopK after a cheap product: find candidates in low precision, then rescore them exactly.

A low-precision product gives each row C > k candidates: the latents with the C largest approximate
pre-activations, or with the C largest upper bounds on them. The exact value of any other latent is
at most the C-th of these numbers plus a margin for the product's error. So if the k-th largest
exact value among the candidates reaches that sum, the candidates contain the row's k largest
latents. This test is the row's certificate. Rows that fail it are encoded again without the
prefilter.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch

from sae_core.kernels.interface import SparseLatents
from sae_core.kernels.keys import pack_keys, unpack_keys

_FEW_LATENTS = 8
"""Smallest L / k at which to prefilter; below it, too many of the latents would be candidates."""
_LARGEST_K = 256
"""Largest k at which to prefilter. For larger k, as in AuxK, rescoring costs as much time as the
cheap product saves."""


class Candidates(NamedTuple):
    """Candidate latents of each row, found in low precision."""

    values: torch.Tensor
    """[B, C] float32 approximate pre-activations, or upper bounds on them, in descending order."""
    latents: torch.Tensor
    """[B, C] int64."""
    margin: torch.Tensor
    """[B] float32: largest amount by which one of the row's `values` may be below the exact
    pre-activation."""


class Prefilter(Protocol):
    """A cheap encoder product with a known bound on its error."""

    name: str

    def candidates(
        self, x: torch.Tensor, W_enc: torch.Tensor, b_enc: torch.Tensor, k: int
    ) -> Candidates:
        """Find at least min(k + 1, L) candidates per row.

        A row whose margin is not finite is never certified.

        Args:
            x: [B, D].
            W_enc: [L, D].
            b_enc: [L].
            k: Number of latents to select from the candidates.
        """
        ...


class ExactKernels(Protocol):
    """The exact operations behind a prefilter."""

    def exact_topk(
        self, x: torch.Tensor, W_enc: torch.Tensor, b_enc: torch.Tensor, k: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run `Kernels.encode_topk` with the full product."""
        ...

    def decoder_dot(
        self, vectors: torch.Tensor, active: SparseLatents, matrix: torch.Tensor
    ) -> torch.Tensor:
        """See `Kernels.decoder_dot`."""
        ...


def prefiltered_topk(
    prefilter: Prefilter,
    exact: ExactKernels,
    x: torch.Tensor,
    W_enc: torch.Tensor,
    b_enc: torch.Tensor,
    k: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Select the same k latents of every row as `Kernels.encode_topk` without a prefilter.

    The two selections agree up to the order in which float32 terms are added: two latents whose
    values differ by no more than the resulting rounding may be exchanged. All values are computed
    by the same summation, whether or not their row is certified, so the result does not depend on
    which rows are certified. The host waits for the device once, to learn which rows failed.

    Args:
        prefilter: Finds the candidates.
        exact: Rescores the candidates and encodes the rows that fail.
        x: [B, D] centred inputs.
        W_enc: [L, D].
        b_enc: [L].
        k: Number to select; at most L.

    Returns:
        values [B, k] float32 and latents [B, k] int64.
    """
    if W_enc.shape[0] < _FEW_LATENTS * k or not 0 < k <= _LARGEST_K:
        return exact.exact_topk(x, W_enc, b_enc, k)
    offered = prefilter.candidates(x, W_enc, b_enc, k)
    values, latents = _rescore(exact, x, W_enc, b_enc, offered.latents, k)
    failed = uncertified(offered, values[:, -1], W_enc.shape[0]).nonzero().squeeze(1)
    if len(failed):
        _, again = exact.exact_topk(x[failed], W_enc, b_enc, k)
        values[failed], latents[failed] = _rescore(exact, x[failed], W_enc, b_enc, again, k)
    return values, latents


def uncertified(offered: Candidates, kth: torch.Tensor, n_latents: int) -> torch.Tensor:
    """Mark the rows whose candidates may not include all of the k largest latents, [B] bool.

    Args:
        offered: Candidates found by the prefilter.
        kth: [B] k-th largest exact value among the candidates.
        n_latents: L. If all L latents are candidates, no row is marked.
    """
    if offered.latents.shape[1] >= n_latents:
        return torch.zeros_like(kth, dtype=torch.bool)
    # Not "kth < ...", which is false for NaN: a row with NaN on either side must fail.
    return ~(kth >= offered.values[:, -1] + offered.margin)


def _rescore(
    exact: ExactKernels,
    x: torch.Tensor,
    W_enc: torch.Tensor,
    b_enc: torch.Tensor,
    latents: torch.Tensor,
    k: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Select the k largest of the given latents [B, C] by exact value; ties go to the lowest."""
    B, C = latents.shape
    rows = torch.arange(B, device=x.device)
    flat = latents.reshape(-1)
    pairs = SparseLatents(rows.repeat_interleave(C), flat, b_enc.new_ones(B * C), rows * C)
    values = exact.decoder_dot(x, pairs, W_enc) + b_enc[flat]
    keys = pack_keys(values.float().view(B, C), latents)
    return unpack_keys(keys.topk(k, dim=1).values)
