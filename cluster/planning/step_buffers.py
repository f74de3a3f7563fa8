"""The arrays of a training step on a GPU, their sizes, and the parts of the step that hold them.

The list follows the code of the Triton kernels and of `sae_core.architectures.sparse_autoencode`
line by line, so that it can be checked against them; `tests/unit/cluster/planning` compares it with
the tensors that a step allocates. Weights, moments and gradients are counted in `memory.py`.

Shape legend: B batch rows, A rows of the auxiliary path, R = B + A, D d_model, l latents of the
shard, K and Ka latents selected per row, N slots for pairs of this rank.

Pairs are counted in slots: every row has a slot for each pair that it may have, so that the host
need not know how many there are. Partial sums over rows ([B / 16, D] float32) are not counted: they
exist only inside `centre` and `decode_error`, where less memory is in use than later.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from enum import IntEnum
from typing import NamedTuple

from cluster.planning.work import Work
from sae_core.kernels.keys import LARGEST_NETWORK, pool_width
from sae_core.kernels.prefilter import FIRST_ROUND, is_prefiltered, n_float8_candidates
from sae_core.kernels.triton.prefilter_float8 import SLOTS, side_width

_PIECE = 512
"""`triton.segments.PIECE`: largest number of pairs that one program sums."""
_BIAS_SLOTS = 128
"""`triton.update.BIAS_SLOTS`: latents of a program that sums the bias gradient."""
_PAIR = 8 + 8 + 4
"""Bytes of a pair in `SparseLatents`: row and latent int64, value float32."""


class Moment(IntEnum):
    """Parts of a step in which memory may reach its peak, in order."""

    DEAD = 0
    PREFILTER = 1
    RESCORE = 2
    ENCODE = 3
    COMPACT = 4
    DECODE = 5
    AUX_ENCODE = 6
    AUX_COMPACT = 7
    AUX_DECODE = 8
    FIRED = 9
    WEIGH = 10
    EXCHANGE = 11
    SORT = 12
    SUM = 13
    BIAS = 14
    UPDATE = 15


class Buffer(NamedTuple):
    """One array, or several with the same lifetime."""

    what: str
    """Content of the buffer."""
    n_bytes: float
    """Size in bytes."""
    first: Moment
    """Part of the step in which it is allocated."""
    last: Moment
    """Last part of the step in which it is held."""


def peak(buffers: Iterable[Buffer]) -> tuple[Moment, dict[str, float]]:
    """Return the moment at which the buffers take most memory, and the sizes of those held then."""
    held = {
        moment: {b.what: b.n_bytes for b in buffers if b.first <= moment <= b.last and b.n_bytes}
        for moment in Moment
    }
    most = max(Moment, key=lambda moment: sum(held[moment].values()))
    return most, held[most]


def gpu_buffers(work: Work) -> list[Buffer]:
    """Return all arrays of a step on a GPU."""
    return [
        *_batch(work),
        *_selection(work, "", Moment.ENCODE, work.rows, work.k),
        *_float8(work),
        *_auxiliary(work),
        *_backward(work),
        *_update(work),
    ]


def _batch(work: Work) -> Iterator[Buffer]:
    """Yield the [B, D] arrays of the main path."""
    rows = work.rows * work.d_model
    every = (Moment.DEAD, Moment.UPDATE)
    yield Buffer("raw rows", work.rows * work.device_row_bytes, *every)
    if work.graph:
        # `StepGraph._input`. The graph's memory pool replaces the allocator's.
        yield Buffer("graph's copy of raw rows", work.rows * work.device_row_bytes, *every)
    # The autograd node holds its paths until the step has returned the loss.
    yield Buffer("x, centred", work.gather_bytes * rows, Moment.PREFILTER, Moment.UPDATE)
    yield Buffer("error", work.gather_bytes * rows, Moment.DECODE, Moment.UPDATE)
    if work.latent > 1:
        yield Buffer("reconstruction", 4 * rows, Moment.DECODE, Moment.DECODE)


def _selection(work: Work, path: str, moment: Moment, n_rows: int, k: int) -> Iterator[Buffer]:
    """Yield the arrays of an encoder product and its top-k, and the pairs that it selects.

    Args:
        work: The rank's work.
        path: Prefix of the buffers' names.
        moment: Moment of the encoder product.
        n_rows: Rows of the product.
        k: Latents selected per row over all shards.
    """
    width = min(k, work.shard)  # `encode_shard`: a shard selects at most as many as it has
    slots = n_rows * width
    if work.product_bytes < work.gather_bytes:
        yield Buffer(
            f"{path}product's rows", work.product_bytes * n_rows * work.d_model, *2 * (moment,)
        )
    if work.d_model % 16:
        padded = work.product_bytes * work.shard * (work.d_model + -work.d_model % 16)
        yield Buffer(f"{path}padded dictionary", padded, moment, moment)
    yield Buffer(f"{path}pools of keys", pool_bytes(n_rows, width), moment, moment)
    yield Buffer(f"{path}counts, thresholds, flags", 12 * n_rows, moment, moment)
    compact = Moment(moment + 1)
    if work.latent > 1:
        # values and latents, their slots, keys, masked keys, received keys and their merged copy
        yield Buffer(f"{path}candidates", (12 + 12 + 4 * 8) * slots, compact, compact)
    # `in_slots`: values and latents as selected, and flags of the active ones
    yield Buffer(f"{path}selected", (4 + 8 + 1) * slots, compact, compact)
    yield Buffer(f"{path}pairs", _PAIR * slots + 16 * n_rows, compact, Moment.UPDATE)
    yield Buffer(f"{path}dot products", 4 * slots, Moment(moment + 2), Moment.UPDATE)


def pool_bytes(n_rows: int, k: int) -> float:
    """Return the bytes of the key pools from which `n_rows` rows select `k` latents each."""
    if not k:
        return 0
    width = pool_width(k)
    # `unpack_keys`: empty slots; bits, values and filled values; latents and filled latents
    unpacked = (1 + 3 * 4 + 2 * 8) * k
    if width > LARGEST_NETWORK:
        # `torch.topk` selects from a masked copy, and gives keys and positions.
        return n_rows * (8 * width + max(8 * width + width + (8 + 8) * k, unpacked))
    return n_rows * (8 * width + unpacked)


def _float8(work: Work) -> Iterator[Buffer]:
    """Yield the arrays of the float8 prefilter of the main path."""
    if work.prefilter != "float8" or not is_prefiltered(work.shard, work.k):
        return
    D, B = work.d_model, work.rows
    count = n_float8_candidates(work.d_model, work.shard, work.k)
    side = side_width(D)
    low = -(-(D - min(side - SLOTS, D // 2)) // 16) * 16
    split_bytes = low + 2 * side + 4  # float8 and bfloat16 columns, and the scale
    first = 2 * (Moment.PREFILTER,)
    yield Buffer("float8 dictionary", split_bytes * work.shard, *first)
    yield Buffer("float8 rows", split_bytes * B, *first)
    yield Buffer("pools of candidates", pool_bytes(B, count), *first)
    # `encode_topk` rounds the rows to the product's dtype, and back to float32.
    yield Buffer("rounded rows", 4 * D * B, Moment.PREFILTER, Moment.ENCODE)
    yield Buffer("candidates", (4 + 8) * B * count, Moment.RESCORE, Moment.ENCODE)
    if work.product_bytes < 4:
        # The rows are rounded again where all of them have room to be encoded a second time.
        yield Buffer("rounded rows, cast", work.product_bytes * D * B, *2 * (Moment.ENCODE,))
    # `exact_keys` of the larger round: flags, latents, ones, rows, values with bias, the same
    # without -0.0, bits as int64, and three parts of the keys
    pair_bytes = 1 + 8 + 4 + 8 + 4 + 4 + 8 + 3 * 8
    most = max(FIRST_ROUND * work.k, count - FIRST_ROUND * work.k)
    yield Buffer("rescoring", pair_bytes * B * most, *2 * (Moment.RESCORE,))
    # the best so far: keys, and how many of a row's other candidates are rescored
    yield Buffer("best keys", 8 * B * work.k + 3 * 8 * B, Moment.RESCORE, Moment.ENCODE)


def _auxiliary(work: Work) -> Iterator[Buffer]:
    """Yield the arrays of the auxiliary path."""
    if not work.auxk:
        return
    A, D, l = work.aux_rows, work.d_model, work.shard  # noqa: E741 - `l` as in the legend
    yield Buffer("dead latents, then the others", 8 * l, Moment.DEAD, Moment.AUX_DECODE)
    # `subset_of`: the mask, its running sums, all indices, and the terms of their positions
    yield Buffer("places of dead latents", (1 + 4 * 8) * l, Moment.DEAD, Moment.DEAD)
    if work.rows > A:
        size = work.gather_bytes * A * D
        yield Buffer("auxiliary x", size, Moment.AUX_ENCODE, Moment.UPDATE)
        yield Buffer("auxiliary residual", size, Moment.AUX_ENCODE, Moment.AUX_DECODE)
    yield from _selection(work, "auxiliary ", Moment.AUX_ENCODE, A, work.auxk)
    yield Buffer("auxiliary error", work.gather_bytes * A * D, Moment.AUX_DECODE, Moment.UPDATE)
    if work.latent > 1:
        yield Buffer("auxiliary reconstruction", 4 * A * D, *2 * (Moment.AUX_DECODE,))


def _backward(work: Work) -> Iterator[Buffer]:
    """Yield the sparse gradient (`_weigh`) and its exchange between replicas."""
    D, N = work.d_model, work.slots
    R = work.rows + work.aux_rows
    gathered = R * D * work.gather_bytes
    exchanged = work.fused and work.data > 1
    last = Moment.EXCHANGE if exchanged else Moment.UPDATE
    yield Buffer("latents that fired", work.shard, Moment.FIRED, Moment.UPDATE)
    main = work.rows * min(work.k, work.shard)
    yield Buffer("latents with empty slots moved", (8 + 1) * main, *2 * (Moment.FIRED,))
    # rows, offsets, ends, values and gradients are computed for each path
    weighted = (8 + 4 + 4) * N + 2 * 8 * R
    if work.auxk:
        # and then joined, with the latents, x and error of both
        yield Buffer("weighted pairs", weighted - 4 * N, Moment.WEIGH, Moment.WEIGH)
        yield Buffer("gradient's x and error", 2 * gathered, Moment.WEIGH, last)
        weighted += 8 * N
    yield Buffer("gradient's pairs", weighted, Moment.WEIGH, last)
    if not work.fused:
        # The bias gradient sums each latent's pairs: weights, clamped latents, and the sums.
        yield Buffer("sums per latent", (4 + 8) * N + 4 * work.shard, *2 * (Moment.EXCHANGE,))
    if exchanged:
        whole, rows = work.update_slots, R * work.data
        held = (Moment.EXCHANGE, Moment.UPDATE)
        yield Buffer("all replicas' x and error", 2 * gathered * work.data, *held)
        yield Buffer("all replicas' pairs", (_PAIR + 4) * whole + 2 * 8 * rows, *held)
        # `_gather_slots`: values and gradients of this replica, then those of all
        yield Buffer("pairs in transit", 8 * N + 8 * whole, *2 * (Moment.EXCHANGE,))


def _update(work: Work) -> Iterator[Buffer]:
    """Yield the sorted pairs and sums of the update (`triton.segments`, `triton.update`)."""
    N, D, l = work.update_slots, work.d_model, work.shard  # noqa: E741 - `l` as in the legend
    held = (Moment.SUM, Moment.UPDATE)
    # latents as int32, sorted, and the order
    yield Buffer("latents to sort", 4 * N, Moment.SORT, Moment.SORT)
    yield Buffer("order of pairs", (4 + 8) * N, Moment.SORT, Moment.SUM)
    # the radix sort's input positions, and its second buffers of keys and positions
    yield Buffer("sort workspace", (8 + 4 + 8) * N, Moment.SORT, Moment.SORT)
    yield Buffer("sorted pairs", (8 + 4 + 4) * N, *held)
    n_pieces = N // _PIECE + N // (_PIECE + 1) if N > _PIECE else 0
    yield Buffer("sums of pieces", n_pieces * (2 * 4 * D + 4), *held)
    yield Buffer("owners of pieces", 2 * 8 * n_pieces, Moment.SUM, Moment.SUM)
    # edges of the latents' pairs, and ends of their pieces
    yield Buffer("edges", (8 + 8) * l, *held)
    # indices of latents as int32, and counts and pieces per latent
    yield Buffer("counts per latent", (4 + 8 + 8) * l, Moment.SUM, Moment.SUM)
    if work.fused:
        partial = 4 * D * -(-l // _BIAS_SLOTS)
        yield Buffer("parts of the bias gradient", partial, Moment.BIAS, Moment.BIAS)
        yield Buffer("squares per latent", 4 * l, Moment.UPDATE, Moment.UPDATE)
    else:
        # row gradients of both matrices; rows of W_dec, their product and the projection
        yield Buffer("row gradients", 5 * 4 * D * work.used, *held)
