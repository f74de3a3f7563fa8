"""Encoder product whose epilogue keeps only values that can still be selected.

The [B, L] pre-activations are never written. All kernels compute a tile with the same function, so
a pre-activation has the same bits in each of them.
"""

# Triton ships no types, and kernel arguments have none that mypy understands.
# mypy: disable-error-code="no-untyped-def, import-untyped, import-not-found"

from __future__ import annotations

import triton
import triton.language as tl

from sae_core.kernels.triton.prefilter_float8 import SIDE_STEP
from sae_core.kernels.triton.select import pack_key

_NONE = tl.constexpr(0x7FFFFFFF)
_SIDE = tl.constexpr(SIDE_STEP)


@triton.jit
def _block_of(pid, n_rows, n_latents, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr):
    """Return a program's (row block, latent block).

    GROUP row blocks go through the latent blocks in step, so that they share W's rows in L2.
    """
    row_blocks = tl.cdiv(n_rows, BM)
    per_group = GROUP * tl.cdiv(n_latents, BN)
    first = (pid // per_group) * GROUP
    size = tl.minimum(row_blocks - first, GROUP)
    within = pid % per_group
    return first + within % size, within // size


@triton.jit
def _tile_pre_acts(
    x, W, b, x_side, W_side, x_scales, W_scales, rows, columns, n_rows, n_latents, D,
    side_columns, x_stride, W_stride,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
    SPLIT: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Compute a tile of pre-activations, [BM, BN] float32.

    The caller must mask elements outside the matrix.

    SPLIT: rows of x and W are split (see `SplitRows`). x_side and W_side hold `side_columns` more
    columns, a multiple of `_SIDE`, and the product is scaled by x_scales and W_scales.
    WIDEN: convert float8 to float16 and bfloat16 to float32 before multiplying. This is exact, and
    needed because the interpreter can multiply neither float8 nor bfloat16.
    """
    # int64: a row index times its stride exceeds 2**31 in a dictionary of a million latents.
    row = tl.where(rows < n_rows, rows, 0).to(tl.int64)[:, None]
    latent = tl.where(columns < n_latents, columns, 0).to(tl.int64)[None, :]
    x_rows, W_rows = x + row * x_stride, W + latent * W_stride
    depth = tl.arange(0, BK)
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    for start in range(0, D, BK):
        left = depth < D - start
        x_tile = tl.load(x_rows + (start + depth)[None, :], mask=left[None, :], other=0.0)
        W_tile = tl.load(W_rows + (start + depth)[:, None], mask=left[:, None], other=0.0)
        if WIDEN:
            x_tile, W_tile = x_tile.to(tl.float16), W_tile.to(tl.float16)
        acc = tl.dot(x_tile, W_tile, acc, input_precision=PRECISION)
    bias = tl.load(b + columns, mask=columns < n_latents, other=0.0)[None, :]
    if SPLIT:
        # Add the bfloat16 products last. Float8 units truncate sums to about 14 bits of the largest
        # term and would lose bits of these products; bfloat16 units keep nearly 24.
        x_rows, W_rows = x_side + row * side_columns, W_side + latent * side_columns
        depth = tl.arange(0, _SIDE)
        for start in range(0, side_columns, _SIDE):
            x_tile = tl.load(x_rows + (start + depth)[None, :])
            W_tile = tl.load(W_rows + (start + depth)[:, None])
            if WIDEN:
                x_tile, W_tile = x_tile.to(tl.float32), W_tile.to(tl.float32)
            acc = tl.dot(x_tile, W_tile, acc, input_precision=PRECISION)
        acc *= tl.load(x_scales + rows, mask=rows < n_rows, other=0.0)[:, None]
        scale = tl.load(W_scales + columns, mask=columns < n_latents, other=0.0)[None, :]
        # Use an explicit fma: the compiler might otherwise fuse these operations in one kernel and
        # not in another.
        return tl.fma(acc, tl.broadcast_to(scale, (BM, BN)), tl.broadcast_to(bias, (BM, BN)))
    return acc + bias


@triton.jit
def keys_kernel(
    x, W, b, x_side, W_side, x_scales, W_scales, out, n_rows, n_latents, first_latent, D,
    side_columns, x_stride, W_stride, out_stride,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    PRECISION: tl.constexpr, SPLIT: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Write the keys of all pairs of a narrow segment to out, [n_rows, n_latents] int64."""
    row_block, block = _block_of(tl.program_id(0), n_rows, n_latents, BM, BN, GROUP)
    rows = row_block * BM + tl.arange(0, BM)
    columns = block * BN + tl.arange(0, BN)
    acc = _tile_pre_acts(
        x, W, b, x_side, W_side, x_scales, W_scales, rows, columns, n_rows, n_latents, D,
        side_columns, x_stride, W_stride, BM, BN, BK, PRECISION, SPLIT, WIDEN,
    )  # fmt: skip
    keys = pack_key(acc, (first_latent + columns)[None, :])
    inside = (rows < n_rows)[:, None] & (columns < n_latents)[None, :]
    tl.store(out + rows.to(tl.int64)[:, None] * out_stride + columns[None, :], keys, mask=inside)


@triton.jit
def _halves(tile, BM: tl.constexpr, BN: tl.constexpr):
    """Split a tile's columns into a left and a right half."""
    return tl.split(tl.permute(tl.reshape(tile, (BM, 2, BN // 2)), (0, 2, 1)))


@triton.jit
def _quarters(tile, BM: tl.constexpr, BN: tl.constexpr):
    """Split a tile's columns into four parts, from left to right."""
    left, right = _halves(tile, BM, BN)
    first, second = _halves(left, BM, BN // 2)
    third, fourth = _halves(right, BM, BN // 2)
    return first, second, third, fourth


@triton.jit
def _append_all(
    tile, rows, columns, limit, pool, counts, n_rows, n_latents, first_latent, WIDTH: tl.constexpr
):
    """Append the keys of all values above the limit at once, for tiles with many."""
    hit = (tile <= limit[:, None]) == 0
    hit = hit & (rows < n_rows)[:, None] & (columns < n_latents)[None, :]
    counters = counts + rows[:, None] + tl.zeros_like(columns)[None, :]
    slot = tl.atomic_add(counters, 1, mask=hit, sem="relaxed")
    keys = pack_key(tile, (first_latent + columns)[None, :])
    place = pool + rows.to(tl.int64)[:, None] * WIDTH + slot
    tl.store(place, keys, mask=hit & (slot < WIDTH))


@triton.jit
def _append_few(
    tile, rows, columns, limit, pool, counts, n_rows, n_latents, first_latent, WIDTH: tl.constexpr
):
    """Append the keys of values above the limit, one per row at a time, for tiles with few."""
    # Columns past the last latent, and all columns of rows past the last row, become `_NONE`.
    column = tl.where(columns < n_latents, columns, _NONE)[None, :]
    found = _first_above(tile, column, limit, rows < n_rows)
    while tl.min(found, 0) < _NONE:
        here = column == found[:, None]
        value = tl.sum(tl.where(here, tile, 0.0), 1)
        hit = found < _NONE
        slot = tl.atomic_add(counts + rows, 1, mask=hit, sem="relaxed")
        place = pool + rows.to(tl.int64) * WIDTH + slot
        tl.store(place, pack_key(value, first_latent + found), mask=hit & (slot < WIDTH))
        # Remove the value from the tile: recording it separately would need twice the registers.
        tile = tl.where(here, float("-inf"), tile)
        found = _first_above(tile, column, limit, rows < n_rows)


@triton.jit
def _first_above(tile, column, limit, inside):
    """Return each row's first column with a value above the limit, or `_NONE`."""
    first = tl.min(tl.where(tile <= limit[:, None], _NONE, column), 1)
    return tl.where(inside, first, _NONE)


@triton.jit
def filter_kernel(
    x, W, b, x_side, W_side, x_scales, W_scales, threshold, pool, counts, n_rows, n_latents,
    first_latent, D, side_columns, x_stride, W_stride,
    WIDTH: tl.constexpr, MANY: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, GROUP: tl.constexpr, PRECISION: tl.constexpr, SPLIT: tl.constexpr,
    WIDEN: tl.constexpr,
):  # fmt: skip
    """Append the keys of values above threshold [n_rows] to pool [n_rows, WIDTH].

    counts [n_rows] counts the keys; a count above WIDTH means that the row lost keys.

    The slot that a key gets depends on the order in which programs run, but the set of keys does
    not, and the result of `select` does not depend on slots. "Above" is computed as "not at most",
    so that NaN is appended; a maximum would silently drop it.
    """
    row_block, block = _block_of(tl.program_id(0), n_rows, n_latents, BM, BN, GROUP)
    rows = row_block * BM + tl.arange(0, BM)
    columns = block * BN + tl.arange(0, BN)
    acc = _tile_pre_acts(
        x, W, b, x_side, W_side, x_scales, W_scales, rows, columns, n_rows, n_latents, D,
        side_columns, x_stride, W_stride, BM, BN, BK, PRECISION, SPLIT, WIDEN,
    )  # fmt: skip
    limit = tl.load(threshold + rows, mask=rows < n_rows, other=float("inf"))
    if MANY:
        # Append in quarters, to limit the registers that hold slots and addresses.
        quarters = _quarters(acc, BM, BN)
        for i in tl.static_range(4):
            part = block * BN + i * (BN // 4) + tl.arange(0, BN // 4)
            _append_all(
                quarters[i], rows, part, limit, pool, counts, n_rows, n_latents, first_latent,
                WIDTH,
            )  # fmt: skip
    else:
        _append_few(acc, rows, columns, limit, pool, counts, n_rows, n_latents, first_latent, WIDTH)
