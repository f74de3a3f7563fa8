"""Encoder product whose epilogue keeps only values that can still be selected.

The [B, L] pre-activations are never written. Rows and latents may be limited to a `Subset`, whose
size only the device knows. Grids then cover all of them, and programs past the last member exit.
"""

# Triton ships no types, and kernel arguments have none that mypy understands.
# mypy: disable-error-code="no-untyped-def, import-untyped, import-not-found"

from __future__ import annotations

import triton
import triton.language as tl

from sae_core.kernels.keys import EMPTY_KEY
from sae_core.kernels.triton.encoder.epilogue import (
    NONE,
    append_all,
    append_few,
    append_inline,
    quarters,
)
from sae_core.kernels.triton.encoder.product import block_of, is_past, members, tile_pre_acts
from sae_core.kernels.triton.encoder.select import pack_key
from sae_core.kernels.triton.launch import COUNTS

_EMPTY = tl.constexpr(EMPTY_KEY)


@triton.jit(do_not_specialize=COUNTS)
def keys_kernel(
    x, W, b, x_side, W_side, x_scales, W_scales, out, row_index, row_count, latent_index,
    latent_count, n_rows, n_latents, D, side_columns, x_stride, W_stride, out_stride,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    PRECISION: tl.constexpr, SPLIT: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Write the keys of all pairs to out, [n_rows, n_latents] int64.

    With a subset of the latents, the keys are those at its first `n_latents` positions. Positions
    past its last member get empty keys.
    """
    row_block, block = block_of(tl.program_id(0), n_rows, n_latents, BM, BN, GROUP)
    if is_past(row_count, row_block * BM):
        return
    rows, row_lives = members(row_index, row_count, row_block * BM, n_rows, BM)
    latents, live = members(latent_index, latent_count, block * BN, n_latents, BN)
    acc = tile_pre_acts(
        x, W, b, x_side, W_side, x_scales, W_scales, rows, latents, live, 0, 0, D, side_columns,
        x_stride, W_stride, BM, BN, BK, PRECISION, SPLIT, WIDEN, False,
    )  # fmt: skip
    keys = tl.where(live[None, :], pack_key(acc, latents[None, :]), _EMPTY)
    places = block * BN + tl.arange(0, BN)
    inside = row_lives[:, None] & (places < n_latents)[None, :]
    tl.store(out + rows.to(tl.int64)[:, None] * out_stride + places[None, :], keys, mask=inside)


@triton.jit
def _filter_tile(
    row_block, first, x, W, b, x_side, W_side, x_scales, W_scales, threshold, pool, counts,
    row_index, row_count, latent_index, latent_count, n_rows, stop, D, side_columns, x_stride,
    W_stride, width,
    EPILOGUE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, PRECISION: tl.constexpr, SPLIT: tl.constexpr, WIDEN: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """Run `filter_kernel` for one block of rows and the latents from position `first` on."""
    rows, row_lives = members(row_index, row_count, row_block * BM, n_rows, BM)
    latents, live = members(latent_index, latent_count, first, stop, BN)
    acc = tile_pre_acts(
        x, W, b, x_side, W_side, x_scales, W_scales, rows, latents, live, row_block * BM, first, D,
        side_columns, x_stride, W_stride, BM, BN, BK, PRECISION, SPLIT, WIDEN, DESCRIPTORS,
    )  # fmt: skip
    limit = tl.load(threshold + rows, mask=row_lives, other=float("inf"))
    if EPILOGUE == "all":
        # Append in quarters, to limit the registers that hold slots and addresses.
        parts = quarters(acc, BM, BN)
        for i in tl.static_range(4):
            latents, live = members(
                latent_index, latent_count, first + i * (BN // 4), stop, BN // 4
            )
            append_all(parts[i], rows, row_lives, latents, live, limit, pool, counts, width)
    elif EPILOGUE == "few":
        append_few(acc, rows, row_lives, latents, live, limit, pool, counts, width)
    else:
        tl.static_assert(EPILOGUE == "inline")
        # Positions are cheaper than the indices that `members` has computed from them: a thread
        # computes each where it is used, instead of keeping 64 of them in registers.
        end = stop
        if latent_index is None:
            latents = first + tl.arange(0, BN)
        else:
            latents, end = tl.where(live, latents, NONE), NONE
        append_inline(acc, rows, row_lives, latents, end, limit, pool, counts, width)


@triton.jit(do_not_specialize=COUNTS)
def filter_kernel(
    x, W, b, x_side, W_side, x_scales, W_scales, threshold, pool, counts, row_index, row_count,
    latent_index, latent_count, n_rows, first, stop, D, side_columns, x_stride, W_stride, width,
    EPILOGUE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, GROUP: tl.constexpr, PRECISION: tl.constexpr, SPLIT: tl.constexpr,
    WIDEN: tl.constexpr, DESCRIPTORS: tl.constexpr, PERSISTENT: tl.constexpr,
):  # fmt: skip
    """Append the keys of values above threshold [n_rows] to pool [n_rows, width].

    The latents are those at positions [first, stop). counts [n_rows] counts the keys; a count
    above width means that the row lost keys.

    The slot that a key gets depends on the order in which programs run, but the set of keys does
    not, and the result of `select` does not depend on slots.

    x, W: pointers, or with DESCRIPTORS tensor descriptors of blocks [BM, BK] and [BN, BK].
    EPILOGUE: "all", "few" or "inline"; see `append_all` etc.
    PERSISTENT: a fixed number of programs work through all tiles. The loops over tiles and columns
    become one, so that a program loads the next tile's first columns during a tile's epilogue. Rows
    and latents cannot be limited to subsets.
    """
    if PERSISTENT:
        tiles = tl.cdiv(n_rows, BM) * tl.cdiv(stop - first, BN)
        for tile_index in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
            row_block, block = block_of(tile_index, n_rows, stop - first, BM, BN, GROUP)
            _filter_tile(
                row_block, first + block * BN, x, W, b, x_side, W_side, x_scales, W_scales,
                threshold, pool, counts, None, None, None, None, n_rows, stop, D, side_columns,
                x_stride, W_stride, width, EPILOGUE, BM, BN, BK, PRECISION, SPLIT, WIDEN,
                DESCRIPTORS,
            )  # fmt: skip
    else:
        row_block, block = block_of(tl.program_id(0), n_rows, stop - first, BM, BN, GROUP)
        first += block * BN
        if is_past(row_count, row_block * BM) or is_past(latent_count, first):
            return
        _filter_tile(
            row_block, first, x, W, b, x_side, W_side, x_scales, W_scales, threshold, pool, counts,
            row_index, row_count, latent_index, latent_count, n_rows, stop, D, side_columns,
            x_stride, W_stride, width, EPILOGUE, BM, BN, BK, PRECISION, SPLIT, WIDEN, DESCRIPTORS,
        )  # fmt: skip
