"""A second pass for rows whose pool overflowed, decided on the device.

Overflow is rare where the order of latents is arbitrary, so this pass is simple, not fast. One
program encodes a block of rows against all latents, and reduces its rows' pools to k keys whenever
the next tile might not fit. Blocks without a lost row exit at once, so the host need not know
whether there are any.
"""

# Triton ships no types, and kernel arguments have none that mypy understands.
# mypy: disable-error-code="no-untyped-def, import-untyped, import-not-found"

from __future__ import annotations

import triton
import triton.language as tl

from sae_core.kernels.keys import EMPTY_KEY
from sae_core.kernels.triton.encoder.product import members, tile_pre_acts
from sae_core.kernels.triton.encoder.select import pack_key
from sae_core.kernels.triton.launch import COUNTS, FP_FUSION

_EMPTY = tl.constexpr(EMPTY_KEY)
_ROWS = 16
"""Rows per program, the fewest that tensor cores multiply."""
_LATENTS = 32
"""Latents per tile. A pool has room for k keys and this many more; see `keys.pool_width`."""
_SLOTS = 64
"""Slots of a pool that are loaded at a time; the width of a pool is a multiple of this."""


@triton.jit
def _keys_at(pool, rows, held, first, width, SLOTS: tl.constexpr):
    """Return the keys in the slots from `first` on, [rows, SLOTS]; empty where there are none."""
    slots = first + tl.arange(0, SLOTS)[None, :]
    place = pool + rows.to(tl.int64)[:, None] * width + slots
    return tl.load(place, mask=slots < held[:, None], other=_EMPTY)


@triton.jit
def _reduce_pools(pool, rows, held, k, width, BM: tl.constexpr, SLOTS: tl.constexpr):
    """Keep the k largest keys of each row's pool; return the new counts and k-th keys.

    held [BM] int32: keys in each row's pool. The k-th key of a row with fewer keys is empty.
    """
    # Build the k-th key from the top bit: a bit is set if at least k keys are no smaller.
    cut = tl.full((BM,), _EMPTY, tl.int64)
    for i in range(64):
        # Adding 2**63 to the smallest int64 gives 0: the sum wraps.
        trial = cut + (tl.full((BM,), 1, tl.int64) << (63 - i))
        larger = tl.zeros((BM,), tl.int32)
        for first in range(0, width, SLOTS):
            keys = _keys_at(pool, rows, held, first, width, SLOTS)
            larger += tl.sum((keys >= trial[:, None]).to(tl.int32), 1)
        cut = tl.where(larger >= k, trial, cut)
    kept = tl.zeros((BM,), tl.int32)
    for first in range(0, width, SLOTS):
        keys = _keys_at(pool, rows, held, first, width, SLOTS)
        keep = (keys >= cut[:, None]) & (keys != _EMPTY)
        slot = kept[:, None] + tl.cumsum(keep.to(tl.int32), 1) - 1
        tl.debug_barrier()  # no thread may overwrite a key that another has yet to load
        tl.store(pool + rows.to(tl.int64)[:, None] * width + slot, keys, mask=keep)
        kept += tl.sum(keep.to(tl.int32), 1)
        tl.debug_barrier()
    return kept, cut


@triton.jit(do_not_specialize=COUNTS)
def overflow_kernel(
    x, W, b, x_side, W_side, x_scales, W_scales, pool, counts, overflow, latent_index,
    latent_count, n_rows, n_latents, D, side_columns, x_stride, W_stride, k, width,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    SLOTS: tl.constexpr, PRECISION: tl.constexpr, SPLIT: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Refill the pools of rows that lost keys, with keys that include the row's k largest.

    Rows lost keys if overflow [n_rows] is set, or if counts [n_rows] is larger than the pools
    [n_rows, width]. Their counts are set to the number of keys in the new pool.
    """
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    inside = rows < n_rows
    lost = tl.load(overflow + rows, mask=inside, other=0) > 0
    lost = lost | (tl.load(counts + rows, mask=inside, other=0) > width)
    if tl.max(lost.to(tl.int32), 0) == 0:
        return
    rows = tl.where(inside, rows, 0)
    held = tl.zeros((BM,), tl.int32)
    least = tl.full((BM,), _EMPTY, tl.int64)
    for start in range(0, n_latents, BN):
        latents, live = members(latent_index, latent_count, start, n_latents, BN)
        acc = tile_pre_acts(
            x, W, b, x_side, W_side, x_scales, W_scales, rows, latents, live, 0, 0, D,
            side_columns, x_stride, W_stride, BM, BN, BK, PRECISION, SPLIT, WIDEN, False,
        )  # fmt: skip
        keys = pack_key(acc, latents[None, :])
        hit = (keys > least[:, None]) & live[None, :] & lost[:, None]
        slot = held[:, None] + tl.cumsum(hit.to(tl.int32), 1) - 1
        tl.store(pool + rows.to(tl.int64)[:, None] * width + slot, keys, mask=hit)
        held += tl.sum(hit.to(tl.int32), 1)
        tl.debug_barrier()
        if tl.max(held, 0) > width - BN:
            held, least = _reduce_pools(pool, rows, held, k, width, BM, SLOTS)
    tl.store(counts + rows, held, mask=lost)


def overflow_shape(BK: int) -> dict[str, int]:
    """Return the compile-time sizes and launch options of `overflow_kernel`.

    Args:
        BK: Columns of d_model loaded at a time; that of the other kernels, so that terms are added
            in the same order.
    """
    sizes = {"BM": _ROWS, "BN": _LATENTS, "BK": BK, "SLOTS": _SLOTS}
    return {**sizes, "num_warps": 4, "num_stages": 2, "maxnreg": 240, **FP_FUSION}


def overflow_grid(n_rows: int) -> tuple[int]:
    """Return the launch grid that covers this many rows."""
    return (triton.cdiv(n_rows, _ROWS),)
