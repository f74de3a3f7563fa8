"""The body made of stock torch operations: fast on CPU, and it runs on any device torch has.

The pre-activations exist only in pieces of `_CHUNK` latents: each piece is reduced to the maxima of
small groups, and only groups that can still hold one of the row's k largest are looked at again.
Weight gradients are segment sums over pairs sorted by latent, so no [B, K, D] tensor and no
atomic addition exists, and the same input gives the same bits.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from sae_core.kernels.interface import RowGradients, SparseLatents
from sae_core.kernels.keys import EMPTY_KEY, pack_keys, unpack_keys

_CHUNK_ELEMENTS = 1 << 22  # 16 MiB of fp32 pre-activations: stays in the last-level cache
_MIN_CHUNK = 2048


class StockKernels:
    """See `Kernels`.

    Args:
        compute_dtype: dtype of the encoder product; bfloat16 sums in float32 and then rounds the
            pre-activations to bfloat16, so that near-equal ones tie.
    """

    name = "stock"

    def __init__(self, compute_dtype: torch.dtype = torch.float32) -> None:
        self.compute_dtype = compute_dtype

    def encode_topk(
        self, x: torch.Tensor, W_enc: torch.Tensor, b_enc: torch.Tensor, k: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        B, L = x.shape[0], W_enc.shape[0]
        x = x.to(self.compute_dtype)
        best = torch.full((B, k), EMPTY_KEY, dtype=torch.int64, device=x.device)
        chunk = max(_MIN_CHUNK, _CHUNK_ELEMENTS // max(B, 1))
        for start in range(0, L, chunk):
            stop = min(start + chunk, L)
            pre_acts = self._linear(x, W_enc[start:stop], b_enc[start:stop])
            best = _merge_chunk(best, pre_acts, start, k)
        return unpack_keys(best)

    def decode(self, active: SparseLatents, W_dec: torch.Tensor) -> torch.Tensor:
        return F.embedding_bag(
            active.latents, W_dec, active.offsets, mode="sum", per_sample_weights=active.values
        )

    def decoder_dot(
        self, grad: torch.Tensor, active: SparseLatents, W_dec: torch.Tensor
    ) -> torch.Tensor:
        dot: torch.Tensor = torch.ops.aten._embedding_bag_per_sample_weights_backward(
            grad, W_dec, active.latents, active.offsets, active.rows, 0
        )
        return dot

    def row_gradients(
        self, active: SparseLatents, dvalues: torch.Tensor, x: torch.Tensor, grad: torch.Tensor
    ) -> RowGradients:
        # Stable: within a latent the pairs stay in row order, so the sum's rounding is fixed.
        by_latent, order = active.latents.sort(stable=True)
        latents, counts = by_latent.unique_consecutive(return_counts=True)
        offsets = counts.cumsum(0) - counts
        rows, dvalues = active.rows[order], dvalues[order]

        def segment_sum(weights: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
            return F.embedding_bag(rows, matrix, offsets, mode="sum", per_sample_weights=weights)

        db_enc = torch.segment_reduce(dvalues, "sum", lengths=counts) if len(counts) else dvalues
        return RowGradients(
            latents, segment_sum(active.values[order], grad), segment_sum(dvalues, x), db_enc
        )

    def _linear(self, x: torch.Tensor, W: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        if self.compute_dtype != torch.float32:
            return F.linear(x, W.to(self.compute_dtype)).float() + b
        if x.device.type == "cpu" and torch.backends.mkldnn.is_available():
            # oneDNN's fp32 product is up to twice as fast as the default one on AMD.
            out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, W, b, "none", [], "")
            return out
        return F.linear(x, W, b)


def _merge_chunk(best: torch.Tensor, pre_acts: torch.Tensor, start: int, k: int) -> torch.Tensor:
    """Keys [B, k] of the largest among `best` and pre-activations [B, C] from latent `start` on."""
    B, C = pre_acts.shape
    group = _group_size(C, k)
    if group == 1:
        latents = torch.arange(start, start + C, device=pre_acts.device)
        keys = pack_keys(pre_acts, latents.expand(B, C))
        return torch.cat((best, keys), 1).topk(k, dim=1).values
    rows, columns = _survivors(best, pre_acts, k, group)
    values = pre_acts[rows, columns]
    candidates = _pad_rows(pack_keys(values, columns + start), rows, B)
    return torch.cat((best, candidates), 1).topk(k, dim=1).values


def _group_size(C: int, k: int) -> int:
    """Largest group that divides C and leaves at least 2 k groups, whose maxima bound the k-th."""
    for group in (64, 32, 16, 8):
        if C % group == 0 and C // group >= 2 * k:
            return group
    return 1


def _survivors(
    best: torch.Tensor, pre_acts: torch.Tensor, k: int, group: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows, columns) of what can be among a row's k largest; rows ascending."""
    B, C = pre_acts.shape
    maxima = pre_acts.view(B, C // group, group).amax(-1)
    # k groups reach the k-th largest maximum, so k values do: nothing below it can be selected.
    bound = maxima.topk(k, dim=1).values[:, -1]
    bound = torch.maximum(bound, unpack_keys(best[:, -1])[0])[:, None]
    # "not below" instead of "at least": ties and NaN must survive.
    rows, groups = (~(maxima < bound)).nonzero(as_tuple=True)
    members = pre_acts.view(B * (C // group), group)[rows * (C // group) + groups]
    pair, column = (~(members < bound[rows])).nonzero(as_tuple=True)
    return rows[pair], groups[pair] * group + column


def _pad_rows(keys: torch.Tensor, rows: torch.Tensor, B: int) -> torch.Tensor:
    """[N] keys with ascending rows to [B, most per row], empty slots last."""
    counts = torch.bincount(rows, minlength=B)
    starts = counts.cumsum(0) - counts
    slot = torch.arange(len(rows), device=rows.device) - starts[rows]
    out = keys.new_full((B, int(counts.max()) if B else 0), EMPTY_KEY)
    out[rows, slot] = keys
    return out
