"""Exact TopK after a cheap product: find candidates in low precision, then rescore them exactly.

A low-precision product gives each row C > k candidates: the latents with the C largest approximate
pre-activations, or with the C largest upper bounds on them. The exact value of any other latent is
at most the C-th of these numbers plus a margin for the product's error. So if the k-th largest
exact value among the candidates reaches that sum, the candidates contain the row's k largest
latents. This test is the row's certificate. Rows that fail it are encoded again without the
prefilter.

Kernels for which the host must not wait (`ExactKernels.asynchronous`) rescore in two rounds: the
best 2 k candidates, then only those whose number plus margin still reaches the k-th largest exact
value of the first round. How many these are, and which rows fail, only the device knows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch

from sae_core.kernels.interface import EMPTY, SparseLatents, Subset
from sae_core.kernels.keys import EMPTY_KEY, pack_keys, unpack_keys
from sae_core.kernels.pairs import subset_of

_FEW_LATENTS = 8
"""Smallest L / k at which to prefilter; below it, too many of the latents would be candidates."""
_LARGEST_K = 256
"""Largest k at which to prefilter. For larger k, as in AuxK, rescoring costs as much time as the
cheap product saves."""
FIRST_ROUND = 2
"""Candidates per selected latent in the first round of rescoring."""
_FLOAT8_PER_K = 6
"""Candidates of the float8 prefilter per selected latent.

This and the next number certify at least 95% of the rows of all kinds tried, with 131,072 latents
(`benchmarks/results/float8-rates-cpu.json`).
"""
_FLOAT8_PER_K_WIDE = 7
"""Candidates of the float8 prefilter per selected latent if d_model is at least `_WIDE`.

The bound on the truncation of sums grows with d_model, while candidates cost less relative to the
product of longer rows.
"""
_WIDE = 2048
"""Smallest d_model that counts as wide."""
_MOST_CANDIDATES = 864
"""Maximum number of candidates; with more, the pool would exceed `keys.LARGEST_NETWORK`."""


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

    asynchronous: bool
    """See `Kernels.asynchronous`."""

    def exact_topk(
        self, x: torch.Tensor, W_enc: torch.Tensor, b_enc: torch.Tensor, k: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run `Kernels.encode_topk` with the full product.

        Asynchronous kernels also take `rows: Subset`. The results then still have the shape
        [B, k], but only the rows in the subset are set.
        """
        ...

    def decoder_dot(
        self, vectors: torch.Tensor, active: SparseLatents, matrix: torch.Tensor
    ) -> torch.Tensor:
        """See `Kernels.decoder_dot`; what it returns for empty slots is unspecified."""
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
    which rows are certified.

    Args:
        prefilter: Finds the candidates.
        exact: Rescores the candidates and encodes the rows that fail.
        x: [B, D] centred inputs.
        W_enc: [L, D].
        b_enc: [L].
        k: Number to select; at most L.

    Returns:
        values [B, k] float32, descending, and latents [B, k] int64.
    """
    if not is_prefiltered(W_enc.shape[0], k):
        return exact.exact_topk(x, W_enc, b_enc, k)
    offered = prefilter.candidates(x, W_enc, b_enc, k)
    problem = _Problem(exact, x, W_enc, b_enc, k)
    if exact.asynchronous:
        return unpack_keys(problem.select_on_device(offered))
    return unpack_keys(problem.select(offered))


def n_float8_candidates(d_model: int, n_latents: int, k: int) -> int:
    """Return the number of candidates that the float8 prefilter finds for each row."""
    per_k = _FLOAT8_PER_K_WIDE if d_model >= _WIDE else _FLOAT8_PER_K
    return min(per_k * k, _MOST_CANDIDATES, n_latents)


def is_prefiltered(n_latents: int, k: int) -> bool:
    """Return True if a selection of `k` from `n_latents` latents uses the prefilter."""
    return n_latents >= _FEW_LATENTS * k and 0 < k <= _LARGEST_K


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
    return ~((kth >= offered.values[:, -1] + offered.margin) & offered.margin.isfinite())


class _Problem(NamedTuple):
    """An encoder product whose k largest values per row are wanted, as keys [B, k], descending."""

    exact: ExactKernels
    x: torch.Tensor
    W_enc: torch.Tensor
    b_enc: torch.Tensor
    k: int

    def select(self, offered: Candidates) -> torch.Tensor:
        """Rescore all candidates; the host waits for the device, to learn which rows failed."""
        best = self.best(self.exact_keys(offered.latents))
        failed = self.failed(offered, best).nonzero().squeeze(1)
        if len(failed):
            rows = self._replace(x=self.x[failed])
            _, again = self.exact.exact_topk(rows.x, self.W_enc, self.b_enc, self.k)
            best[failed] = rows.best(rows.exact_keys(again))
        return best

    def select_on_device(self, offered: Candidates) -> torch.Tensor:
        """Rescore the candidates in two rounds; the host never waits for the device."""
        first = min(FIRST_ROUND * self.k, offered.latents.shape[1])
        best = self.best(self.exact_keys(offered.latents[:, :first]))
        rest = Candidates(offered.values[:, first:], offered.latents[:, first:], offered.margin)
        if rest.latents.shape[1]:
            found = self.exact_keys(rest.latents, _still_open(rest, self.kth(best)))
            best = self.best(torch.cat((best, found), 1))
        failed = self.failed(offered, best)
        again = self.encode_again(subset_of(failed))
        found = self.exact_keys(again, failed * self.k)
        return torch.where(failed[:, None], self.best(found), best)

    def best(self, keys: torch.Tensor) -> torch.Tensor:
        """Return the k largest keys of every row, descending."""
        return keys.topk(self.k, dim=1).values

    def kth(self, best: torch.Tensor) -> torch.Tensor:
        """Return every row's k-th largest value, [B]."""
        return unpack_keys(best[:, -1])[0]

    def failed(self, offered: Candidates, best: torch.Tensor) -> torch.Tensor:
        """Mark the rows whose candidates are not certified."""
        return uncertified(offered, self.kth(best), self.W_enc.shape[0])

    def encode_again(self, rows: Subset) -> torch.Tensor:
        """Return the latents [B, k] that the full product selects; only those of `rows` are set."""
        encode: Callable[..., tuple[torch.Tensor, torch.Tensor]] = self.exact.exact_topk
        return encode(self.x, self.W_enc, self.b_enc, self.k, rows=rows)[1]

    def exact_keys(self, latents: torch.Tensor, counts: torch.Tensor | None = None) -> torch.Tensor:
        """Return the keys of the given latents' exact values, [B, C].

        Args:
            latents: [B, C] int64.
            counts: [B] int64: only this many of a row's latents, the first ones, are rescored; the
                others' keys are empty. None means all.
        """
        B, C = latents.shape
        rows = torch.arange(B, device=self.x.device)
        offsets = rows * C
        ends = offsets + (C if counts is None else counts)
        if counts is not None:
            unused = torch.arange(C, device=self.x.device) >= counts[:, None]
            latents = latents.masked_fill(unused, EMPTY)
        flat = latents.reshape(-1)
        ones = self.b_enc.new_ones(B * C)
        pairs = SparseLatents(rows.repeat_interleave(C), flat, ones, offsets, ends)
        values = self.exact.decoder_dot(self.x, pairs, self.W_enc)
        values = values + self.b_enc[flat.clamp_min(0)]
        keys = pack_keys(values.float().view(B, C), latents)
        return keys if counts is None else keys.masked_fill(unused, EMPTY_KEY)


def _still_open(rest: Candidates, kth: torch.Tensor) -> torch.Tensor:
    """Return how many of the candidates may have one of the row's k largest values, [B] int64.

    Args:
        rest: Candidates not yet rescored.
        kth: [B] k-th largest exact value so far.
    """
    # Not ">= kth", which is false for NaN: a candidate with NaN must be rescored.
    reaching = ~(rest.values + rest.margin[:, None] < kth[:, None])
    # A row without a finite margin fails in any case.
    return reaching.sum(1) * rest.margin.isfinite()
