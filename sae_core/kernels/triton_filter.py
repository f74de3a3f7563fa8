"""Encoder product whose epilogue keeps only what can still be selected: [B, L] is never written.

All kernels share one tile product, so a pre-activation has the same bits whichever computed it.
"""

# Triton has no types, and a kernel's arguments none that mypy knows.
# mypy: disable-error-code="no-untyped-def, import-untyped, import-not-found"

from __future__ import annotations

import triton
import triton.language as tl

from sae_core.kernels.prefilter_float8 import SIDE_STEP
from sae_core.kernels.triton_select import pack_key

_NONE = tl.constexpr(0x7FFFFFFF)
_SIDE = tl.constexpr(SIDE_STEP)


@triton.jit
def _block_of(pid, n_rows, n_latents, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr):
    """(row block, latent block): GROUP row blocks walk over the latents together."""
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
    """[BM, BN] fp32 pre-activations; what lies outside is to be masked by the caller.

    SPLIT: row r of x stands for x_scales[r] times itself and has more columns in x_side, whose
    number `_SIDE` divides; likewise of W. WIDEN: both to float16 and float32 before the products,
    exactly, for the interpreter.
    """
    # int64: a row times its stride passes 2**31 in a dictionary of a million latents.
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
        # Last: the float8 units cut sums off at 14 bits of the largest, these at nearly 24.
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
        # Spelled out: left to the compiler, one kernel might fuse what another does not.
        return tl.fma(acc, tl.broadcast_to(scale, (BM, BN)), tl.broadcast_to(bias, (BM, BN)))
    return acc + bias


@triton.jit
def keys_kernel(
    x, W, b, x_side, W_side, x_scales, W_scales, out, n_rows, n_latents, first_latent, D,
    side_columns, x_stride, W_stride, out_stride,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    PRECISION: tl.constexpr, SPLIT: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Every key of a narrow segment: out [n_rows, n_latents] int64."""
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
    """The left and the right half of a tile's columns."""
    return tl.split(tl.permute(tl.reshape(tile, (BM, 2, BN // 2)), (0, 2, 1)))


@triton.jit
def _quarters(tile, BM: tl.constexpr, BN: tl.constexpr):
    """A tile's columns in four parts, from left to right."""
    left, right = _halves(tile, BM, BN)
    first, second = _halves(left, BM, BN // 2)
    third, fourth = _halves(right, BM, BN // 2)
    return first, second, third, fourth


@triton.jit
def _append_all(
    tile, rows, columns, limit, pool, counts, n_rows, n_latents, first_latent, WIDTH: tl.constexpr
):
    """Appends what is above, every place of the tile on its own; for tiles with many such."""
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
    """Appends what is above, one column per row and turn; for tiles with hardly any."""
    # A latent outside is "none", and so is every latent of a row outside.
    column = tl.where(columns < n_latents, columns, _NONE)[None, :]
    found = _first_above(tile, column, limit, rows < n_rows)
    while tl.min(found, 0) < _NONE:
        here = column == found[:, None]
        value = tl.sum(tl.where(here, tile, 0.0), 1)
        hit = found < _NONE
        slot = tl.atomic_add(counts + rows, 1, mask=hit, sem="relaxed")
        place = pool + rows.to(tl.int64) * WIDTH + slot
        tl.store(place, pack_key(value, first_latent + found), mask=hit & (slot < WIDTH))
        # Taken out of the tile: a memory of what was above would cost as many registers again.
        tile = tl.where(here, float("-inf"), tile)
        found = _first_above(tile, column, limit, rows < n_rows)


@triton.jit
def _first_above(tile, column, limit, inside):
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
    """Appends to pool [n_rows, WIDTH] what is above threshold [n_rows]; counts [n_rows] goes on
    counting past WIDTH, which marks the row as lost.

    Which slot a key gets is a race; which keys there are is not, and `select` heeds no slot.
    "Above" is "not at most": NaN has to pass, a maximum would drop it without a word.
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
        # In quarters, so that the slots and addresses of one need not live beside all others.
        quarters = _quarters(acc, BM, BN)
        for i in tl.static_range(4):
            part = block * BN + i * (BN // 4) + tl.arange(0, BN // 4)
            _append_all(
                quarters[i], rows, part, limit, pool, counts, n_rows, n_latents, first_latent,
                WIDTH,
            )  # fmt: skip
    else:
        _append_few(acc, rows, columns, limit, pool, counts, n_rows, n_latents, first_latent, WIDTH)
