"""Operations, bytes, issue slots and launches of a training step on a GPU, part by part.

Counted from the code as it is; change them together with the kernels. "Slot" is a place for a pair
of a row and a latent (`kernels.interface.in_slots`): a step sorts all of them. Bytes are counted as
if no gathered row were found in a cache, except in the second pass of `decode_error`.

A part takes the longest of its times for arithmetic, for memory and for issuing instructions, plus
its launches. What cannot be counted is in `Assumptions`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.step.work import Work
from sae_core.kernels.keys import LARGEST_NETWORK, pool_width
from sae_core.kernels.prefilter import FIRST_ROUND, n_float8_candidates


@dataclass(frozen=True)
class Rates:
    """Work that a device does per second."""

    name: str
    flop_per_s: float
    """FLOP/s of a large bfloat16 product."""
    bytes_per_s: float
    """Bytes per second that a large copy reads and writes."""
    slots_per_s: float
    """Instructions that all schedulers issue per second, one per warp and cycle."""
    launch_s: float
    """Seconds that a small operation takes on the device, from the end of the one before.

    The host needs longer, but runs ahead, or the step is a CUDA graph."""


@dataclass(frozen=True)
class Assumptions:
    """Assumptions about what cannot be counted."""

    wide: float
    """Speed of the encoder's best tile (128 x 256, 8 warps) relative to the bare product."""
    square: float
    """The same of the tile of 128 x 128 with 4 warps, which float8 and subsets of rows use."""
    many: float
    """The same of the tile of 128 x 64 that appends many keys, with its epilogue."""
    exposed: float
    """Share of the wide tile's epilogue that no product hides. One program has a multiprocessor to
    itself. Of the square tile there are two, which hide each other's epilogues."""
    issue: float
    """Share of the issue slots used by parts that are bound by instructions."""


EXPECTED = Assumptions(wide=660 / 790, square=495 / 790, many=0.4, exposed=1.0, issue=0.5)
"""Published H100 figures of such tiles in TFLOP/s, of 790 for cuBLAS; the rest is a guess."""
BEST = Assumptions(wide=1.0, square=1.0, many=0.6, exposed=0.0, issue=1.0)
"""A product as fast as cuBLAS, and nothing lost elsewhere: a limit, not an expectation."""


@dataclass(frozen=True)
class Count:
    """Work of one part of a step."""

    part: str
    flop: float = 0.0
    """Operations at the rate of a bfloat16 product."""
    n_bytes: float = 0.0
    """Bytes read and written."""
    launches: float = 0.0
    slots: float = 0.0
    """Issue slots of all warps, divided by the share that is used."""

    def seconds(self, rates: Rates) -> float:
        """Return the predicted seconds."""
        busy = max(
            self.flop / rates.flop_per_s,
            self.n_bytes / rates.bytes_per_s,
            self.slots / rates.slots_per_s,
        )
        return busy + self.launches * rates.launch_s


@dataclass(frozen=True)
class Options:
    """Settings of a step that change its counts; see `benchmarks.step.ours.Variant`."""

    clip: bool = False
    """Whether gradients are clipped, which needs their norm before the update."""
    auxk_share: float = 0.0
    """Share of the rows with the auxiliary loss."""
    moment_bytes: int = 4
    """Bytes per element of Adam's moments."""
    float8: bool = False
    """Whether the encoder has the float8 prefilter."""


SELECT_INSTRUCTIONS = {
    **{1: 336, 2: 744, 3: 1056, 5: 1264, 9: 1432, 13: 1704, 17: 1872, 33: 2072, 34: 2224},
    **{65: 2520, 82: 2592, 129: 2736, 186: 3496, 257: 3616, 409: 7128, 513: 8520},
}
"""Instructions of `select_kernel`, by the smallest k of its kind; unrolled, so each runs once. From
the compile report."""
SPLIT_INSTRUCTIONS = {1024: 2224, 4096: 2304}
"""Instructions of `split_kernel` with bfloat16 rows, by columns of a tile. From the report."""
SLOTS_PER_MISS = 3.56
"""Issue slots of the inline epilogue for 32 values; tile 128 x 256 with descriptors. From the
report."""
_SLOTS_PER_HIT = 25 + 2 * 4
"""Issue slots for a value above the limit (benchmarks/notes/kernels.md), and a vote and a branch
for each value of its group."""
_WIDE_BN, _ROWS_SHARING_W = 256, 8 * 128
_GROWTH = 4
_MOST_KEYS = 4
"""`Candidate.most_keys` of the inline epilogue."""
CERTIFIED = 0.95
"""Share of the rows that the float8 prefilter certifies: the least that is asked of it. Emulated at
(131k, 4096, 64): all of 256 rows (benchmarks/results/float8-rates-cpu.json)."""
SECOND_ROUND = 3.51
"""Candidates per selected latent that are rescored in the second round: the largest mean in that
file. The least is 0.26, and more than 5 is impossible at D 4096."""
_DEAD_SHARE = 0.1
"""Share of dead latents in the steps with the auxiliary loss; see `benchmarks.step.ours`."""
_L1_BYTES, _L2_BYTES, _MULTIPROCESSORS, _DECODE_PROGRAMS = 200e3, 50e6, 132, 3


def step_counts(work: Work, options: Options, assumed: Assumptions) -> list[Count]:
    """Count a whole step by part.

    Args:
        work: Sizes.
        options: Settings of the step.
        assumed: What cannot be counted.
    """
    B, D, L, k = float(work.B), work.D, work.L, work.k
    main = B * k
    counts = [
        # raw float32 in; bfloat16 rows out; the programs' sums out and in
        Count("centre", 0, (4 + 2) * B * D + 2 * 4 * B / 16 * D, 3),
        *encode_counts(work, assumed, float8=options.float8),
        _in_slots(main),
        decoding(work, k, B, 4),
        # Empty slots are compared and replaced, then one byte in a sector is written.
        Count("latents that fired", 0, (9 + 17 + 8 + 32) * main + 2 * L, 6),
    ]
    rows, slots = B, main
    if options.auxk_share:
        auxk = 1 << (max(D // 2, 1).bit_length() - 1)
        rows += options.auxk_share * B
        slots += options.auxk_share * B * auxk
        counts += _auxiliary(work, auxk, options.auxk_share, assumed)
    # rows, offsets, values and dots are computed; those of two paths are then concatenated
    stacked = 48 * slots + 2 * 2 * 2 * rows * D if options.auxk_share else 0.0
    counts += [
        Count("weigh and stack", 0, 32 * slots + stacked, 16 if options.auxk_share else 9),
        *sorting(work, slots),
        # W_enc's copy; gradients and rows of the pairs; edges; the programs' sums
        Count("bias gradient", 0, 2 * L * D + 12 * slots + 16 * L + 2 * 4 * L / 128 * D, 4),
    ]
    if options.clip:
        # x and error of each pair, W_dec, and the indices of the pairs
        square = 2 * 2 * slots * D + 4 * L * D + (2 * 8 + 2 * 4) * slots + 24 * L
        counts.append(Count("norm", 0, square, 2))
    counts.append(updating(work, slots, options))
    # losses, flags, norm, b_dec, the age of each latent
    counts.append(Count("scalars and ages", 0, 25 * L, 60))
    return counts


def encode_counts(work: Work, assumed: Assumptions, *, float8: bool) -> list[Count]:
    """Count encoding the batch with TopK over all latents.

    Args:
        work: Sizes.
        assumed: What cannot be counted.
        float8: Whether there is a float8 prefilter in front.
    """
    B, D, L, k = float(work.B), work.D, work.L, work.k
    if not float8:
        return [
            *_product("filter and keys", B, L, L, D, k, assumed, wide=True),
            _select("select", B, L, k, assumed),
        ]
    count = n_float8_candidates(D, L, k)
    # 7/8 of the columns take half the time, and the others are multiplied in bfloat16.
    columns = D * (7 / 8 / 2 + 1 / 8)
    again = 1 - CERTIFIED
    rescored = (FIRST_ROUND * k + SECOND_ROUND * k + again * k) * B
    return [
        _splitting(work, assumed),
        *_product("float8 filter and keys", B, L, L, columns, count, assumed, wide=False),
        _select("float8 select", B, L, count, assumed),
        # a row of W_enc each; then about 250 bytes for the key of every candidate, and the top k
        Count("rescoring", 0, 2 * D * rescored + (250 + 100) * B * (count + k), 90),
        *_product("again", again * B, L, L, D, k, assumed, wide=False),
        _select("select again", B, L, k, assumed),
    ]


def _segments(n_latents: int, k: int, few_columns: int) -> Iterator[tuple[int, int, bool]]:
    """Yield the encoder's segments after the first: first latent, end, and if they have many keys.

    See `Encoder.topk_split`.
    """
    stop = min(pool_width(k), n_latents)
    while stop < n_latents:
        start, stop = stop, min(_GROWTH * stop, n_latents)
        yield start, stop, k * few_columns > _MOST_KEYS * start


def _product(
    part: str,
    rows: float,
    members: float,
    n_latents: int,
    columns: float,
    k: int,
    assumed: Assumptions,
    *,
    wide: bool,
) -> list[Count]:
    """Count the product with its epilogues.

    Args:
        part: Name of the part.
        rows: Rows of the product.
        members: Latents that take part.
        n_latents: Latents in which segments are counted.
        columns: Columns, those in float8 at half.
        k: Latents selected per row.
        assumed: What cannot be counted.
        wide: Whether the tile for few keys is the wide one.
    """
    first = min(pool_width(k), members)
    many, few, hits, keys, launches = first, 0.0, 0.0, first, 4.0
    for start, stop, has_many in _segments(n_latents, k, _WIDE_BN if wide else 128):
        launches += 1
        size = max(0.0, min(stop, members) - start)
        keys += k * size / start
        if has_many:
            many += size
        else:
            few += size
            hits += k * size / start
    speed = assumed.wide if wide else assumed.square
    flop = 2 * rows * columns * (few / speed + many / assumed.many)
    # W is read once for each group of row blocks; a key is a write in a sector and an atomic sum.
    n_bytes = 2 * members * columns * math.ceil(rows / _ROWS_SHARING_W) + 64 * rows * keys
    found = [Count(part, flop, n_bytes, launches)]
    if wide and assumed.exposed:
        slots = rows * few / 32 * SLOTS_PER_MISS + rows * hits * _SLOTS_PER_HIT
        found.append(Count("exposed epilogue", slots=assumed.exposed * slots / assumed.issue))
    return found


def _select(part: str, rows: float, n_latents: int, k: int, assumed: Assumptions) -> Count:
    """Count all selections from the pools, and unpacking the keys."""
    width = pool_width(k)
    times = 1 + sum(1 for _ in _segments(n_latents, k, 1))
    unpacking = 135 * rows * k
    if width > LARGEST_NETWORK:
        # torch.topk: a mask, a masked copy, and eight passes of a radix selection over 64 bits
        return Count(part, 0, times * rows * width * (1 + 8 + 8 + 8 * 8) + unpacking, 12 * times)
    # A program of 4 warps sorts 1024 keys, one of 8 warps a wider row.
    warps = 8 if width > 1024 else 4 * width / 1024
    instructions = SELECT_INSTRUCTIONS[max(kind for kind in SELECT_INSTRUCTIONS if kind <= k)]
    slots = times * rows * warps * instructions / assumed.issue
    return Count(part, 0, times * 8 * 5 * rows * k + unpacking, times + 14, slots)


def _splitting(work: Work, assumed: Assumptions) -> Count:
    """Count splitting the rows of x and W_enc for the float8 prefilter, and their norms."""
    B, L, D = work.B, work.L, work.D
    # x: bfloat16 to float32, sizes, norms, split. W: split, norms.
    n_bytes = B * D * (2 + 4 + 4 + 4 + 4 + 1.125) + L * D * (2 + 1.125 + 2)
    tile = max(1024, 1 << (D - 1).bit_length())
    warps, rows = max(1, min(tile // 256, 8)), max(1, 32 * 32 * min(tile // 256, 8) // tile)
    instructions = SPLIT_INSTRUCTIONS[tile if tile in SPLIT_INSTRUCTIONS else 4096]
    slots = (B + L) / rows * warps * instructions / assumed.issue
    return Count("split rows", 0, n_bytes, 50, slots)


def _in_slots(slots: float, part: str = "") -> Count:
    # flags; rows; latents and values with empty slots; numbers of active pairs
    return Count(f"{part}pairs in slots", 0, (5 + 2 + 8 + 17 + 9 + 1) * slots, 14)


def decoding(work: Work, k: int, rows: float, target_bytes: int, part: str = "") -> Count:
    """Count `decode_error` with k latents for each row.

    A row's decoder rows are read twice. The second time they are found in L1 if those of a
    multiprocessor's programs fit there together, or in L2 if those of all programs do.

    Args:
        work: Sizes; only the width is used.
        k: Latents per row.
        rows: Rows to decode.
        target_bytes: Bytes per element of the target.
        part: Prefix of the part's name.
    """
    of_row = 2 * k * work.D
    held = _DECODE_PROGRAMS * of_row
    cached = held <= _L1_BYTES or _MULTIPROCESSORS * held <= _L2_BYTES
    gathered = rows * of_row * (1 if cached else 2)
    dense = rows * work.D * (target_bytes + 2 + 2 * 4 / 16)
    return Count(f"{part}decode and error", 0, gathered + dense + 32 * rows * k, 4)


def sorting(work: Work, slots: float) -> list[Count]:
    """Count sorting the slots by latent, and finding the latents' edges and pieces."""
    # int32 latents; four passes of a radix sort of keys and positions; three gathers
    sort = 12 + 8 + (4 * 24 + 4) + (8 + 32 + 8) + 2 * (8 + 32 + 4)
    return [Count("sort, edges", 0, sort * slots + 182 * work.L, 26)]


def updating(work: Work, slots: float, options: Options, x_bytes: int = 2) -> Count:
    """Count the update of all rows.

    Masters and both moments are read and written, and the copy is written. Each pair gathers a row
    of x and one of the error.

    Args:
        work: Sizes.
        slots: Pairs.
        options: Settings of the step.
        x_bytes: Bytes per element of x.
    """
    per_weight = 2 * 4 + 2 * 2 * options.moment_bytes + 2
    gathered = (x_bytes + 2) * slots * work.D + (2 * 8 + 2 * 4) * slots + 40 * work.L
    return Count("update", 0, gathered + per_weight * 2 * work.L * work.D, 20)


def _auxiliary(work: Work, auxk: int, share: float, assumed: Assumptions) -> list[Count]:
    """Count the auxiliary path up to its error; its pairs are updated with the others."""
    rows, dead, L, D = share * work.B, _DEAD_SHARE * work.L, work.L, work.D
    # the subset: a mask, its sums, places, and the scatter; the rows, if they are some of them
    taken = 2 * 2 * 2 * rows * D if share < 1 else 0.0
    product = _product("aux filter and keys", rows, dead, L, D, auxk, assumed, wide=False)
    return [
        Count("aux subset", 0, 130 * L + taken, 16),
        *product,
        _select("aux select", rows, L, auxk, assumed),
        _in_slots(rows * auxk, "aux "),
        decoding(work, auxk, rows, 2, "aux "),
    ]
