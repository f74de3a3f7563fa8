"""Selection by key on the device: a bitonic network that keeps the largest int64 keys of each row.

A key orders by value, then by lower latent (`keys.py` says how), and no two pairs of a row share
one, so the result does not depend on the order in which candidates were appended.
"""

# Triton has no types, and a kernel's arguments none that mypy knows.
# mypy: disable-error-code="no-untyped-def, import-untyped, import-not-found"

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from sae_core.kernels.keys import EMPTY_KEY, unpack_keys
from sae_core.kernels.triton_launch import FP_FUSION

_LATENT_MASK = tl.constexpr(0x7FFFFFFF)
_EMPTY = tl.constexpr(EMPTY_KEY)
_LARGEST = tl.constexpr((1 << 63) - 1)
LARGEST_NETWORK = 4096
"""Widest pool that the network sorts; wider ones go through `torch.topk` on the same keys."""
_BLOCK_KEYS = 1024


@triton.jit
def _is_nan(value):
    return value != value  # noqa: PLR0124  (true of NaN alone)


@triton.jit
def pack_key(value, latent):
    """`keys.pack_keys` for fp32 values and int32 latents of one shape."""
    bits = value.to(tl.int32, bitcast=True)
    bits = tl.where(_is_nan(value), bits & _LATENT_MASK, bits)  # every NaN sorts above +inf
    bits = tl.where(value == 0.0, 0, bits)  # -0.0 ties with 0.0
    ordered = bits ^ ((bits >> 31) & _LATENT_MASK)
    return (ordered.to(tl.int64) << 32) | (latent ^ _LATENT_MASK).to(tl.int64)


@triton.jit
def _bit(n_dims: tl.constexpr, axis: tl.constexpr):
    """0 and 1 along `axis` of a hypercube with `n_dims` axes of length 2."""
    return tl.reshape(tl.arange(0, 2), [1] * axis + [2] + [1] * (n_dims - 1 - axis))


@triton.jit
def _exchange(
    cube, n_dims: tl.constexpr, axis: tl.constexpr, stage: tl.constexpr, alternate: tl.constexpr
):
    """Larger first along `axis`; in every second run of 2**stage, smaller first."""
    # The partner by wrapping addition: the interpreter has no fast path for an xor reduction.
    partner = tl.sum(cube, axis, keep_dims=True) - cube
    wants_smaller = _bit(n_dims, axis)
    if alternate:
        wants_smaller = wants_smaller ^ _bit(n_dims, n_dims - 1 - stage)
    return tl.where((cube > partner) != (wants_smaller == 1), cube, partner)


@triton.jit
def _merge(cube, n_dims: tl.constexpr, stage: tl.constexpr, alternate: tl.constexpr):
    """Sorts bitonic runs of 2**stage: descending, or every second one ascending."""
    for j in tl.static_range(stage):
        cube = _exchange(cube, n_dims, n_dims - stage + j, stage, alternate)
    return cube


@triton.jit
def _fold(cube, n_dims: tl.constexpr, LOG_K: tl.constexpr, alternate: tl.constexpr):
    """The 2**LOG_K largest of a descending and an ascending run side by side, sorted."""
    # The larger of each two, one from either run, are the largest of both, and bitonic.
    cube = tl.max(cube, n_dims - 1 - LOG_K)
    return _merge(cube, n_dims - 1, LOG_K, alternate)


@triton.jit
def _largest(keys, LOG_ROWS: tl.constexpr, LOG_WIDTH: tl.constexpr, LOG_K: tl.constexpr):
    """[2**LOG_ROWS, 2**LOG_K] largest keys of each row, descending."""
    cube = tl.reshape(keys, [2] * (LOG_ROWS + LOG_WIDTH))
    for stage in tl.static_range(1, LOG_K + 1):
        cube = _merge(cube, LOG_ROWS + LOG_WIDTH, stage, stage < LOG_WIDTH)
    for level in tl.static_range(LOG_K + 1, LOG_WIDTH + 1):
        # Assigned to a name first, the number of axes would no longer be a constant.
        cube = _fold(cube, LOG_ROWS + LOG_WIDTH + 1 + LOG_K - level, LOG_K, level < LOG_WIDTH)
    return tl.reshape(cube, [1 << LOG_ROWS, 1 << LOG_K])


@triton.jit
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
    """Leaves each row's k largest keys in its first k slots, and says what beats them from now on.

    pool: [B, 2**LOG_WIDTH] int64; counts: [B] int32 keys offered, becomes k;
    threshold: [B] fp32, the k-th value; overflow: [B] int32, becomes 1 where a key was lost.
    """
    rows = tl.program_id(0) * (1 << LOG_ROWS) + tl.arange(0, 1 << LOG_ROWS)
    inside = rows < B
    offered = tl.load(counts + rows, mask=inside, other=0)
    slots = tl.arange(0, 1 << LOG_WIDTH)
    base = pool + (rows.to(tl.int64) << LOG_WIDTH)[:, None]
    # A slot that nothing was written to holds an old key, which must not come back.
    live = slots[None, :] < offered[:, None]
    keys = tl.load(base + slots[None, :], mask=live, other=_EMPTY)
    top = _largest(keys, LOG_ROWS, LOG_WIDTH, LOG_K)
    ranks = tl.arange(0, 1 << LOG_K)[None, :]
    tl.store(base + ranks, top, mask=inside[:, None] & (ranks < k))
    last = tl.min(tl.where(ranks < k, top, _LARGEST), 1)
    ordered = (last >> 32).to(tl.int32)
    value = (ordered ^ ((ordered >> 31) & _LATENT_MASK)).to(tl.float32, bitcast=True)
    # k NaNs already: a later one loses by its latent, so nothing can beat them.
    value = tl.where(_is_nan(value), float("inf"), value)
    tl.store(threshold + rows, value, mask=inside)
    tl.store(counts + rows, tl.zeros_like(offered) + k, mask=inside)
    lost = tl.load(overflow + rows, mask=inside, other=0)
    lost = tl.where(offered > (1 << LOG_WIDTH), 1, lost)
    tl.store(overflow + rows, lost, mask=inside)


def pool_width(k: int) -> int:
    """Slots of a row's pool: k kept, and what a segment three times the latents seen adds.

    That many more latents bring 3 k keys on average, with a standard deviation of sqrt(12 k) when
    the latents' order is arbitrary; 5.8 of these fit, and a row that has more is run again.
    """
    return max(128, 1 << math.ceil(math.log2(4 * k + 20 * math.sqrt(k) + 8)))


def select_shape(width: int, k: int) -> dict[str, int]:
    """Compile-time sizes of `select_kernel`, and its warps."""
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
    """`select_kernel` over all rows, in place."""
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
