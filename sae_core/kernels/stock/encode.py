"""TopK encoding in stock torch operations, one piece of latents at a time.

The full [B, L] pre-activations never exist. Each piece is reduced to the maxima of groups of
adjacent latents, and only groups that may contain one of a row's largest values are examined again.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from sae_core.kernels.keys import EMPTY_KEY, pack_keys, unpack_keys

PIECE_ELEMENTS = 1 << 25
"""Number of pre-activations in a piece. Larger pieces have fewer values to examine again
and need fewer merges."""
_GROUPS = (64, 32, 16, 8)
"""Group sizes in latents, largest first.

Latents left over when a piece is not a multiple of the first size are compared one by one.
"""

Product = Callable[[int, int], torch.Tensor]
"""Maps (start, stop) to the pre-activations of these latents, [B, stop - start], float32 or
bfloat16."""


def streamed_topk(
    product: Product, n_rows: int, n_latents: int, count: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Select the `count` largest pre-activations of every row; ties go to the lowest latent.

    Args:
        product: Computes the pre-activations of a range of latents.
        n_rows: B.
        n_latents: L.
        count: Number to select; at most L.
        device: Device of the result.

    Returns:
        values [B, count] float32, descending, and latents [B, count] int64.
    """
    best = torch.full((n_rows, count), EMPTY_KEY, dtype=torch.int64, device=device)
    piece = max(2048, PIECE_ELEMENTS // max(n_rows, 1) // _GROUPS[0] * _GROUPS[0])
    for start in range(0, n_latents, piece):
        stop = min(start + piece, n_latents)
        best = _merge(best, product(start, stop), start)
    return unpack_keys(best)


def _merge(best: torch.Tensor, pre_acts: torch.Tensor, start: int) -> torch.Tensor:
    """Merge the best keys so far with a piece of pre-activations.

    Args:
        best: [B, count] int64 keys of the largest values so far, descending.
        pre_acts: [B, C] pre-activations of latents [start, start + C).
        start: First latent of the piece.

    Returns:
        [B, count] keys of the largest values among both, descending.
    """
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
    """Return the largest group size that gives at least 3 * count groups, or 1 if none does."""
    for group in _GROUPS:
        if C and C // group >= 3 * count:
            return group
    return 1


def _survivors(
    best: torch.Tensor, pre_acts: torch.Tensor, group: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (rows, columns) of values that may be among a row's largest; rows ascending."""
    n_groups = pre_acts.shape[1] // group
    count = best.shape[1]
    known = unpack_keys(best[:, -1:])[0].to(pre_acts.dtype)
    scores, maxima, bound = _bounds(pre_acts, known, group, count)
    # "~(a < b)" instead of "a >= b", so that NaN survives.
    rows, groups = (~(maxima < bound)).nonzero(as_tuple=True)
    members = scores.reshape(-1, group).index_select(0, rows * n_groups + groups)
    flat = (~(members < bound[rows])).view(-1).nonzero().squeeze(1)
    pair = torch.div(flat, group, rounding_mode="floor")
    return rows[pair], groups[pair] * group + (flat - pair * group)


def _bounds(
    pre_acts: torch.Tensor, known: torch.Tensor, group: int, count: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return scores, their group maxima and each row's lower bound on survivors.

    bfloat16 values are compared by their bits as integers, whose maxima take a fifth of the time to
    compute. The bits of negative values sort in reverse, so they are flipped unless all bounds are
    positive.

    Returns:
        scores [B, C], which sort like the values; group maxima [B, C / group]; bound [B, 1].
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
    # At least `count` groups have a maximum no lower than the count-th largest maximum, so at least
    # `count` values reach it.
    return scores, maxima, torch.maximum(maxima.topk(count, dim=1).values[:, -1:], known)


def _bits(values: torch.Tensor) -> torch.Tensor:
    """Return the int16 bits of bfloat16 values; those of positive values sort like the values.

    A NaN with its sign bit set sorts below them and may be dropped. This is harmless: only
    prefilters select in bfloat16, and they have no finite margin for inputs that give NaN, so
    these rows are encoded again.
    """
    return values.view(torch.int16)


def _ordered(values: torch.Tensor) -> torch.Tensor:
    """Return int16 scores that sort like the bfloat16 values, even if the values are negative."""
    bits = values.view(torch.int16)
    return bits ^ ((bits >> 15) & 0x7FFF)


def _pad_rows(keys: torch.Tensor, rows: torch.Tensor, B: int) -> torch.Tensor:
    """Arrange N keys, sorted by row, as [B, largest count in a row], with empty slots last."""
    counts = torch.bincount(rows, minlength=B)
    starts = counts.cumsum(0) - counts
    slot = torch.arange(len(rows), device=rows.device) - starts[rows]
    out = keys.new_full((B, int(counts.max()) if B else 0), EMPTY_KEY)
    out[rows, slot] = keys
    return out
