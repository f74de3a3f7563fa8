"""Selection by key on the device: a bitonic network that keeps the largest int64 keys of each row.

Keys sort by value, then by lower latent (see `keys.py`), and are unique within a row, so the result
does not depend on the order in which they were appended.
"""

# Triton ships no types, and kernel arguments have none that mypy understands.
# mypy: disable-error-code="no-untyped-def, import-untyped, import-not-found"

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from sae_core.kernels.keys import EMPTY_KEY, LARGEST_NETWORK, unpack_keys
from sae_core.kernels.triton.launch import COUNTS, FP_FUSION

_LATENT_MASK = tl.constexpr(0x7FFFFFFF)
_EMPTY = tl.constexpr(EMPTY_KEY)
_LARGEST = tl.constexpr((1 << 63) - 1)
_BLOCK_KEYS = 1024
"""Keys that a program sorts, unless one row has more."""


@triton.jit
def _is_nan(value):
    return value != value  # noqa: PLR0124  (true only for NaN)


@triton.jit
def pack_key(value, latent):
    """Pack float32 values and int32 latents of equal shape into keys, like `keys.pack_keys`."""
    bits = value.to(tl.int32, bitcast=True)
    bits = tl.where(_is_nan(value), bits & _LATENT_MASK, bits)  # every NaN sorts above +inf
    bits = tl.where(value == 0.0, 0, bits)  # -0.0 ties with 0.0
    ordered = bits ^ ((bits >> 31) & _LATENT_MASK)
    return (ordered.to(tl.int64) << 32) | (latent ^ _LATENT_MASK).to(tl.int64)


@triton.jit
def _bit(n_dims: tl.constexpr, axis: tl.constexpr):
    """Return 0 and 1 along `axis`, shaped to broadcast to `n_dims` axes of length 2."""
    return tl.reshape(tl.arange(0, 2), [1] * axis + [2] + [1] * (n_dims - 1 - axis))


@triton.jit
def _exchange(
    cube, n_dims: tl.constexpr, axis: tl.constexpr, stage: tl.constexpr, alternate: tl.constexpr
):
    """Put the larger key first along `axis`.

    If `alternate`, put the smaller key first in odd runs of 2**stage keys.
    """
    # The partner is the sum minus the key, even if the sum wraps. An xor reduction would also work,
    # but Triton's interpreter has no fast path for it.
    partner = tl.sum(cube, axis, keep_dims=True) - cube
    wants_smaller = _bit(n_dims, axis)
    if alternate:
        wants_smaller = wants_smaller ^ _bit(n_dims, n_dims - 1 - stage)
    return tl.where((cube > partner) != (wants_smaller == 1), cube, partner)


@triton.jit
def _merge(cube, n_dims: tl.constexpr, stage: tl.constexpr, alternate: tl.constexpr):
    """Sort bitonic runs of 2**stage keys: descending, or if `alternate` odd runs ascending."""
    for j in tl.static_range(stage):
        cube = _exchange(cube, n_dims, n_dims - stage + j, stage, alternate)
    return cube


@triton.jit
def _fold(cube, n_dims: tl.constexpr, LOG_K: tl.constexpr, alternate: tl.constexpr):
    """Reduce adjacent descending and ascending runs to their 2**LOG_K largest keys, sorted."""
    # The pairwise maxima of the two runs are the largest keys of both, as a bitonic run.
    cube = tl.max(cube, n_dims - 1 - LOG_K)
    return _merge(cube, n_dims - 1, LOG_K, alternate)


@triton.jit
def _largest(keys, LOG_ROWS: tl.constexpr, LOG_WIDTH: tl.constexpr, LOG_K: tl.constexpr):
    """Return each row's largest keys, descending, [2**LOG_ROWS, 2**LOG_K]."""
    cube = tl.reshape(keys, [2] * (LOG_ROWS + LOG_WIDTH))
    for stage in tl.static_range(1, LOG_K + 1):
        cube = _merge(cube, LOG_ROWS + LOG_WIDTH, stage, stage < LOG_WIDTH)
    for level in tl.static_range(LOG_K + 1, LOG_WIDTH + 1):
        # If assigned to a variable, the number of axes would no longer be a compile-time constant.
        cube = _fold(cube, LOG_ROWS + LOG_WIDTH + 1 + LOG_K - level, LOG_K, level < LOG_WIDTH)
    return tl.reshape(cube, [1 << LOG_ROWS, 1 << LOG_K])


@triton.jit(do_not_specialize=COUNTS)
def select_kernel(
    pool,
    counts,
    threshold,
    overflow,
    B,
    k,
    LOG_ROWS: tl.constexpr,
    LOG_WIDTH: tl.constexpr,
    LOG_K: tl.constexpr,
):
    """Move each row's k largest keys to its first k slots and set the threshold to beat.

    pool: [B, 2**LOG_WIDTH] int64; counts: [B] int32, number of appended keys, set to k;
    threshold: [B] float32, set to the k-th value; overflow: [B] int32, set to 1 if keys were lost.
    """
    rows = tl.program_id(0) * (1 << LOG_ROWS) + tl.arange(0, 1 << LOG_ROWS)
    inside = rows < B
    offered = tl.load(counts + rows, mask=inside, other=0)
    slots = tl.arange(0, 1 << LOG_WIDTH)
    base = pool + (rows.to(tl.int64) << LOG_WIDTH)[:, None]
    # Slots past the count hold keys of an earlier segment, which must not be selected again.
    live = slots[None, :] < offered[:, None]
    keys = tl.load(base + slots[None, :], mask=live, other=_EMPTY)
    top = _largest(keys, LOG_ROWS, LOG_WIDTH, LOG_K)
    ranks = tl.arange(0, 1 << LOG_K)[None, :]
    tl.store(base + ranks, top, mask=inside[:, None] & (ranks < k))
    last = tl.min(tl.where(ranks < k, top, _LARGEST), 1)
    ordered = (last >> 32).to(tl.int32)
    value = (ordered ^ ((ordered >> 31) & _LATENT_MASK)).to(tl.float32, bitcast=True)
    # With k NaNs nothing can be larger: a later NaN loses the tie because of its higher latent.
    value = tl.where(_is_nan(value), float("inf"), value)
    tl.store(threshold + rows, value, mask=inside)
    tl.store(counts + rows, tl.zeros_like(offered) + k, mask=inside)
    lost = tl.load(overflow + rows, mask=inside, other=0)
    lost = tl.where(offered > (1 << LOG_WIDTH), 1, lost)
    tl.store(overflow + rows, lost, mask=inside)


def select_shape(width: int, k: int) -> dict[str, int]:
    """Return the compile-time sizes and launch options of `select_kernel`."""
    rows = max(1, _BLOCK_KEYS // width)
    log_k = (k - 1).bit_length()
    sizes = {"LOG_ROWS": rows.bit_length() - 1, "LOG_WIDTH": width.bit_length() - 1}
    warps = 4 if width <= _BLOCK_KEYS else 8
    return {**sizes, "LOG_K": log_k, "num_warps": warps, **FP_FUSION}


def select(
    pool: torch.Tensor,
    counts: torch.Tensor,
    threshold: torch.Tensor,
    overflow: torch.Tensor,
    k: int,
) -> None:
    """Run `select_kernel` on all rows, in place.

    Args:
        pool: [B, W] int64 keys; the k largest end up in the first k slots.
        counts: [B] int32 number of appended keys; set to k.
        threshold: [B] float32; set to each row's k-th value.
        overflow: [B] int32; set to 1 for rows that lost keys.
        k: Number of keys to keep.
    """
    B, width = pool.shape
    if width <= LARGEST_NETWORK:
        shape = select_shape(width, k)
        grid = (triton.cdiv(B, 1 << shape["LOG_ROWS"]),)
        select_kernel[grid](pool, counts, threshold, overflow, B, k, **shape)
        return
    dead = torch.arange(width, device=pool.device) >= counts[:, None]
    pool[:, :k] = pool.masked_fill(dead, EMPTY_KEY).topk(k, dim=1).values
    value = unpack_keys(pool[:, k - 1])[0]
    threshold.copy_(value.nan_to_num(nan=math.inf, posinf=math.inf, neginf=-math.inf))
    overflow.logical_or_(counts > width)
    counts.fill_(k)
