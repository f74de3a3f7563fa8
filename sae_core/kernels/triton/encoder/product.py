"""The tile product of the encoder, shared by all kernels that need pre-activations.

All of them compute a tile with the same function, so a pre-activation has the same bits in each.
Loads through tensor descriptors, which Hopper's copy engine (TMA) serves, bring the same numbers as
loads through pointers; numbers outside the matrix are read as zeros.
"""

# Triton ships no types, and kernel arguments have none that mypy understands.
# mypy: disable-error-code="no-untyped-def, import-untyped, import-not-found"

from __future__ import annotations

import triton
import triton.language as tl

from sae_core.kernels.triton.prefilter_float8 import PROMOTED, SIDE_STEP

_SIDE = tl.constexpr(SIDE_STEP)
PROMOTE = tl.constexpr(PROMOTED)
"""Number of float8 columns that the tensor cores add before the sum is added in float32.

Their own sums keep about 14 bits. It must be BK of all float8 tiles.
"""


@triton.jit
def block_of(pid, n_rows, n_latents, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr):
    """Return a program's (row block, latent block).

    GROUP row blocks go through the latent blocks in lockstep, to share W's rows in L2.
    """
    row_blocks = tl.cdiv(n_rows, BM)
    per_group = GROUP * tl.cdiv(n_latents, BN)
    first = (pid // per_group) * GROUP
    size = tl.minimum(row_blocks - first, GROUP)
    within = pid % per_group
    return first + within % size, within // size


@triton.jit
def members(index, count, first, stop, SIZE: tl.constexpr):
    """Return the indices at positions [first, first + SIZE) of a subset, and which exist.

    Without a subset (`index` is None), an index is its position. Positions from `stop` on do not
    exist; their index is 0.
    """
    places = first + tl.arange(0, SIZE)
    if index is None:
        live = places < stop
        numbers = tl.where(live, places, 0)
    else:
        live = places < tl.minimum(stop, tl.load(count)).to(tl.int32)
        numbers = tl.load(index + places, mask=live, other=0).to(tl.int32)
    return numbers, live


@triton.jit
def is_past(count, first):
    """Return True if a subset of size `count` has no member at position `first` or later."""
    past = False
    if count is not None:
        past = first >= tl.load(count)
    return past


@triton.jit
def tile_pre_acts(
    x, W, b, x_side, W_side, x_scales, W_scales, rows, latents, live, first_row, first_latent, D,
    side_columns, x_stride, W_stride,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
    SPLIT: tl.constexpr, WIDEN: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """Compute a tile of pre-activations, [BM, BN] float32.

    rows [BM] and latents [BN] are the tile's rows of x and W, and must exist; `live` [BN] marks the
    latents that count. The caller must mask the other elements.
    DESCRIPTORS: x and W are tensor descriptors of blocks [BM, BK] and [BN, BK], and the tile's rows
    are those from first_row and first_latent on. Otherwise they are pointers.
    SPLIT: rows of x and W are split (see `SplitRows`). x_side and W_side hold `side_columns` more
    columns, a multiple of `_SIDE`, and the product is scaled by x_scales and W_scales.
    WIDEN: convert float8 to float16 and bfloat16 to float32 before multiplying. This is exact, and
    needed because the interpreter can multiply neither float8 nor bfloat16.
    """
    # int64: a row index times its stride exceeds 2**31 in a dictionary of a million latents.
    row = rows.to(tl.int64)[:, None]
    latent = latents.to(tl.int64)[None, :]
    depth = tl.arange(0, BK)
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    for start in range(0, D, BK):
        if DESCRIPTORS:
            x_tile = x.load([first_row, start])
            W_tile = W.load([first_latent, start]).T
        else:
            left = depth < D - start
            x_where = x + row * x_stride + (start + depth)[None, :]
            W_where = W + latent * W_stride + (start + depth)[:, None]
            x_tile = tl.load(x_where, mask=left[None, :], other=0.0)
            W_tile = tl.load(W_where, mask=left[:, None], other=0.0)
        if WIDEN:
            x_tile, W_tile = x_tile.to(tl.float16), W_tile.to(tl.float16)
        acc = tl.dot(
            x_tile, W_tile, acc, input_precision=PRECISION,
            max_num_imprecise_acc=PROMOTE if SPLIT else None,
        )  # fmt: skip
    bias = tl.load(b + latents, mask=live, other=0.0)[None, :]
    if SPLIT:
        # Add the bfloat16 products last, and always load them through pointers: descriptors for
        # them as well make the compiler spill 160 registers.
        x_rows, W_rows = x_side + row * side_columns, W_side + latent * side_columns
        depth = tl.arange(0, _SIDE)
        for start in range(0, side_columns, _SIDE):
            x_tile = tl.load(x_rows + (start + depth)[None, :])
            W_tile = tl.load(W_rows + (start + depth)[:, None])
            if WIDEN:
                x_tile, W_tile = x_tile.to(tl.float32), W_tile.to(tl.float32)
            acc = tl.dot(x_tile, W_tile, acc, input_precision=PRECISION)
        acc *= tl.load(x_scales + rows)[:, None]
        scale = tl.load(W_scales + latents, mask=live, other=0.0)[None, :]
        # Use an explicit fma: the compiler might otherwise fuse these operations in one kernel and
        # not in another.
        return tl.fma(acc, tl.broadcast_to(scale, (BM, BN)), tl.broadcast_to(bias, (BM, BN)))
    return acc + bias
