"""Encoder product and selection in pieces of latents, of stock torch operations.

The pre-activations exist only in pieces: each is reduced to the maxima of groups of neighbouring
latents, and only groups that can still hold one of a row's largest are looked at again.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from sae_core.kernels.keys import EMPTY_KEY, pack_keys, unpack_keys

PIECE_ELEMENTS = 1 << 25
"""Pre-activations that exist at once. Larger pieces leave fewer survivors and fewer merges."""
_GROUPS = (64, 32, 16, 8)
"""Latents of a group; a piece's latents beyond a multiple of the first are looked at one by one."""

Product = Callable[[int, int], torch.Tensor]
"""(start, stop) -> [B, stop - start] pre-activations of these latents, float32 or bfloat16."""


def streamed_topk(
    product: Product, n_rows: int, n_latents: int, count: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """The `count` largest pre-activations of every row, descending; ties to the lowest latent.

    Args:
        product: gives the pre-activations of a range of latents.
        n_rows: B.
        n_latents: L.
        count: at most L.
        device: of the result.

    Returns:
        values [B, count] float32 and latents [B, count] int64.
    """
    best = torch.full((n_rows, count), EMPTY_KEY, dtype=torch.int64, device=device)
    piece = max(2048, PIECE_ELEMENTS // max(n_rows, 1) // _GROUPS[0] * _GROUPS[0])
    for start in range(0, n_latents, piece):
        stop = min(start + piece, n_latents)
        best = _merge(best, product(start, stop), start)
    return unpack_keys(best)


def _merge(best: torch.Tensor, pre_acts: torch.Tensor, start: int) -> torch.Tensor:
    """Keys [B, count] of the largest among `best` and pre-activations [B, C] from `start` on."""
    B, C = pre_acts.shape
    count = best.shape[1]
    whole = C // _GROUPS[0] * _GROUPS[0]
    group = _group_size(whole, count)
    candidates = [best]
    if group == 1:
        whole = 0
    else:
        rows, columns = _survivors(best, pre_acts[:, :whole], group)
        values = pre_acts[rows, columns].float()
        candidates.append(_pad_rows(pack_keys(values, columns + start), rows, B))
    if whole < C:
        latents = torch.arange(start + whole, start + C, device=pre_acts.device)
        candidates.append(pack_keys(pre_acts[:, whole:].float(), latents.expand(B, C - whole)))
    return torch.cat(candidates, 1).topk(count, dim=1).values


def _group_size(C: int, count: int) -> int:
    """Largest group that leaves enough groups for their maxima to bound the count-th value."""
    for group in _GROUPS:
        if C and C // group >= 3 * count:
            return group
    return 1


def _survivors(
    best: torch.Tensor, pre_acts: torch.Tensor, group: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows, columns) of what can be among a row's largest; rows ascending."""
    n_groups, count = pre_acts.shape[1] // group, best.shape[1]
    known = unpack_keys(best[:, -1:])[0].to(pre_acts.dtype)
    scores, maxima, bound = _bounds(pre_acts, known, group, count)
    # "not below" instead of "at least": ties and NaN must survive.
    rows, groups = (~(maxima < bound)).nonzero(as_tuple=True)
    members = scores.reshape(-1, group).index_select(0, rows * n_groups + groups)
    flat = (~(members < bound[rows])).view(-1).nonzero().squeeze(1)
    pair = torch.div(flat, group, rounding_mode="floor")
    return rows[pair], groups[pair] * group + (flat - pair * group)


def _bounds(
    pre_acts: torch.Tensor, known: torch.Tensor, group: int, count: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(scores [B, C] that order like the values, group maxima of them, bound [B, 1] on survivors).

    bfloat16 is looked at as the integers that its bits are, whose maxima take a fifth of the time.
    Negative ones order the other way round, so where a bound is negative they are turned.
    """
    if pre_acts.dtype != torch.bfloat16:
        return _bounds_of(pre_acts, known, group, count)
    found = _bounds_of(_bits(pre_acts), _bits(known), group, count)
    if bool((found[2] > 0).all()):
        return found
    return _bounds_of(_ordered(pre_acts), _ordered(known), group, count)


def _bounds_of(
    scores: torch.Tensor, known: torch.Tensor, group: int, count: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    maxima = scores.unflatten(1, (-1, group)).amax(-1)
    # `count` groups reach the count-th largest maximum, so as many values do.
    return scores, maxima, torch.maximum(maxima.topk(count, dim=1).values[:, -1:], known)


def _bits(values: torch.Tensor) -> torch.Tensor:
    """As integers, positive values order alike. A NaN with its sign set is below them and may be
    dropped: only prefilters select in bfloat16, and inputs that give NaN have no margin there."""
    return values.view(torch.int16)


def _ordered(values: torch.Tensor) -> torch.Tensor:
    bits = values.view(torch.int16)
    return bits ^ ((bits >> 15) & 0x7FFF)


def _pad_rows(keys: torch.Tensor, rows: torch.Tensor, B: int) -> torch.Tensor:
    """[N] keys with ascending rows to [B, most per row], empty slots last."""
    counts = torch.bincount(rows, minlength=B)
    starts = counts.cumsum(0) - counts
    slot = torch.arange(len(rows), device=rows.device) - starts[rows]
    out = keys.new_full((B, int(counts.max()) if B else 0), EMPTY_KEY)
    out[rows, slot] = keys
    return out
