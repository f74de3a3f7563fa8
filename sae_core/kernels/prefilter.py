"""Exact TopK behind a cheap product: candidates from low precision, rescored in high precision.

A low-precision product gives the C largest approximate pre-activations of each row, C > k, or the C
largest upper bounds. What is not among them is, in truth, at most the C-th such value plus what is
left of the product's error. So if the k-th exact value among the candidates reaches that sum, the
candidates hold the row's k largest: that is the row's certificate. Rows without one are encoded
again without the prefilter.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch

from sae_core.kernels.interface import SparseLatents
from sae_core.kernels.keys import pack_keys, unpack_keys

_FEW_LATENTS = 8
"""Times k: with fewer latents the candidates would be no small part of them."""
_LARGEST_K = 256
"""With more, as AuxK wants, rescoring costs what the product saves."""


class Candidates(NamedTuple):
    """What a prefilter offers."""

    values: torch.Tensor
    """[B, C] float32 approximate pre-activations, or upper bounds on them, descending."""
    latents: torch.Tensor
    """[B, C] int64."""
    margin: torch.Tensor
    """[B] float32: how far such a value may lie below the exact one."""


class Prefilter(Protocol):
    """A cheap product whose error is known."""

    name: str

    def candidates(
        self, x: torch.Tensor, W_enc: torch.Tensor, b_enc: torch.Tensor, k: int
    ) -> Candidates:
        """At least min(k + 1, L) candidates a row; a margin that is not finite certifies nothing.

        Args:
            x: [B, D].
            W_enc: [L, D].
            b_enc: [L].
            k: wanted in the end.
        """
        ...


class Exact(Protocol):
    """The operations that have the last word."""

    def exact_topk(
        self, x: torch.Tensor, W_enc: torch.Tensor, b_enc: torch.Tensor, k: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`Kernels.encode_topk` by the whole product."""
        ...

    def decoder_dot(
        self, vectors: torch.Tensor, active: SparseLatents, matrix: torch.Tensor
    ) -> torch.Tensor:
        """See `Kernels`."""
        ...


def prefiltered_topk(
    prefilter: Prefilter,
    exact: Exact,
    x: torch.Tensor,
    W_enc: torch.Tensor,
    b_enc: torch.Tensor,
    k: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`Kernels.encode_topk`: the same k latents of every row as without the prefilter.

    "The same" is up to the order in which float32 sums are added: two latents that differ by that
    little may change places. Values always come from the same sum, whichever way a row went, so
    the result does not depend on which rows were certified. Reads back which rows failed.

    Args:
        prefilter: offers candidates.
        exact: rescores them, and encodes the rows that fail.
        x: [B, D].
        W_enc: [L, D].
        b_enc: [L].
        k: at most L.
    """
    if W_enc.shape[0] < _FEW_LATENTS * k or not 0 < k <= _LARGEST_K:
        return exact.exact_topk(x, W_enc, b_enc, k)
    offered = prefilter.candidates(x, W_enc, b_enc, k)
    values, latents = _rescored(exact, x, W_enc, b_enc, offered.latents, k)
    failed = uncertified(offered, values[:, -1], W_enc.shape[0]).nonzero().squeeze(1)
    if len(failed):
        _, again = exact.exact_topk(x[failed], W_enc, b_enc, k)
        values[failed], latents[failed] = _rescored(exact, x[failed], W_enc, b_enc, again, k)
    return values, latents


def uncertified(offered: Candidates, kth: torch.Tensor, n_latents: int) -> torch.Tensor:
    """[B] bool: rows whose candidates may lack one of the k largest.

    Args:
        offered: by the prefilter.
        kth: [B] k-th exact value among them.
        n_latents: L; when all are candidates there is nothing to lack.
    """
    if offered.latents.shape[1] >= n_latents:
        return torch.zeros_like(kth, dtype=torch.bool)
    # Not ">=" negated: NaN on either side must fail.
    return ~(kth >= offered.values[:, -1] + offered.margin)


def _rescored(
    exact: Exact,
    x: torch.Tensor,
    W_enc: torch.Tensor,
    b_enc: torch.Tensor,
    latents: torch.Tensor,
    k: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The k best of given latents [B, C] by exact value, ties to the lowest."""
    B, C = latents.shape
    rows = torch.arange(B, device=x.device)
    flat = latents.reshape(-1)
    pairs = SparseLatents(rows.repeat_interleave(C), flat, b_enc.new_ones(B * C), rows * C)
    values = exact.decoder_dot(x, pairs, W_enc) + b_enc[flat]
    keys = pack_keys(values.float().view(B, C), latents)
    return unpack_keys(keys.topk(k, dim=1).values)
