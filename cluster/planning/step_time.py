"""Time of a step, as a sequence of computations and collectives, each with its duration.

Bytes and operations of the kernels are counted as in benchmarks/notes/kernels.md and cpu.md.
Computations do not overlap with collectives, because the code waits for each collective. Reading
overlaps with the whole step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from cluster.planning.hardware import Hardware, Rates, shared_among
from cluster.planning.links import collectives, seconds
from cluster.planning.work import Work
from sae_core.config import TrainConfig
from sae_core.kernels.keys import LARGEST_NETWORK, pool_width
from sae_core.kernels.prefilter import FIRST_ROUND, is_prefiltered, n_float8_candidates
from sae_core.kernels.prefilter_choice import NO_PREFILTER, candidates, fastest
from sae_core.kernels.registry import KERNELS, default_kernels

_FLOAT8_PRODUCT = 7 / 8 / 2 + 1 / 8
"""Time of the float8 product divided by that in bfloat16: seven eighths of the columns take half
the time, and the others are multiplied in bfloat16."""
_CERTIFIED = 0.95
"""Share of the rows that the float8 prefilter certifies. All others are encoded a second time.
Emulated at L 131,072: 0.96 to 1 (`benchmarks/results/float8-rates-cpu.json`)."""
_SECOND_ROUND = 3.5
"""Candidates per selected latent that the float8 prefilter rescores in its second round: the
largest mean in that file."""
_SPLIT_BYTES = 2 + 7 / 8 + 2 / 8 + 2
"""Bytes per weight of splitting the encoder for the float8 prefilter: a bfloat16 weight is read,
its parts are written, and it is read again for the rows' norms."""
_NEAR_BYTES = 200e3 / 3
"""Largest size of a batch row's decoder rows at which `decode_error` finds them in the L1 cache
when it reads them again: three programs share 200 kB. Estimated, not measured."""
_ROW_K = 32
"""k for which `Rates.row_s` of a GPU was estimated."""
_GROWTH = 4
"""Ratio of the latents seen after a segment of Triton's encoder to those seen before it; the pool
is reduced after each segment."""
_WIDE_BYTES = 1 + 8 + 8 + 8 * 8
"""Bytes per key that `torch.topk` moves in a wide pool: a mask, a masked copy, and eight passes of
a radix selection over 64 bits. Estimated, not measured."""
_ZERO_WHOLE, _ZERO_PART = 44, 32
"""Bytes that ZeRO 1 moves for each weight of the shard (zeroing, flattening and copying gradients,
copying parameters twice), and for each weight of the rank's part (averaging, norm, clipping, Adam).
Both are from a profile of two CPU ranks (benchmarks/notes/plan.md)."""
_ENCODER_PARTS = {"bfloat16x3": 3, "bfloat16": 1}
"""Inner dimension of the product in each CPU prefilter, as a multiple of d_model."""


@dataclass(frozen=True)
class Phase:
    """One computation or collective of a step."""

    what: str
    """Name, as printed."""
    group: str | None
    """Group whose ranks wait for one another at the end of the phase. None for a computation."""
    seconds: float
    """Duration."""


def schedule(work: Work, hardware: Hardware) -> list[Phase]:
    """Return the phases of one rank's step, in order.

    Args:
        work: The rank's work.
        hardware: Hardware of one rank, or of a machine that its ranks share.
    """
    here = shared_among(hardware, min(work.n_ranks, hardware.ranks_per_node))
    computing = _computations(work, here)
    calls = collectives(work)
    phases = []
    for part in ("load", "encode", "select", "decode", "backward", "exchange", "norm", "update"):
        for what, taken in computing.get(part, {}).items():
            phases.append(Phase(what, None, taken))
        for call in calls.get(part, []):
            phases.append(Phase(call.what, call.group, seconds(call, work, here)))
    return phases


def step_seconds(phases: list[Phase]) -> float:
    """Return the seconds that a step takes without stragglers."""
    return sum(phase.seconds for phase in phases)


def compute_seconds(phases: list[Phase]) -> float:
    """Return the seconds that a step's computations take, without collectives."""
    return sum(phase.seconds for phase in phases if phase.group is None)


def read_seconds(work: Work, hardware: Hardware) -> float:
    """Return the seconds for reading a rank's part of a batch while all ranks of a node read."""
    ranks = min(work.n_ranks, hardware.ranks_per_node)
    rows = work.rows * work.data if work.mixture else work.rows / work.latent
    part = rows * work.stored_row_bytes
    return part * ranks / hardware.disk_bytes_per_s


def _computations(work: Work, hardware: Hardware) -> dict[str, dict[str, float]]:
    """Return the seconds of each computation: `{part of the step: {name: seconds}}`."""
    rates, D, B = hardware.rates, work.d_model, work.rows
    item = 4 if not work.copy_bytes else work.copy_bytes
    near = work.asynchronous and work.latent == 1 and work.k * D * item <= _NEAR_BYTES
    decoded = (1 if near else 2) * work.pairs * D * item
    parts: dict[str, dict[str, float]] = {
        "load": {
            "normalise, engine": rates.step_s + _dense_bytes(work) / rates.stream_bytes,
        },
        "encode": _encoder(work, B, work.shard, work.k, hardware),
        "decode": {"decode": decoded / rates.gather_bytes},
        # The gradient of the bias needs a pass over the whole encoder matrix, or its copy.
        "backward": {"bias gradient": item * work.matrix / rates.stream_bytes},
        "update": _update(work, hardware),
    }
    if work.auxk:
        # No prefilter selects from a subset that only the device knows.
        own = replace(work, prefilter=NO_PREFILTER) if work.asynchronous else work
        aux = _encoder(own, work.aux_rows, work.dead, work.auxk, hardware)
        copied = 0 if work.asynchronous else 2 * work.dead * D * 4
        parts["encode"]["aux encoder"] = sum(aux.values()) + copied / rates.stream_bytes
    return parts


def _dense_bytes(work: Work) -> float:
    """Return the bytes that a step moves in operations on [B, D] matrices."""
    if not work.asynchronous:
        return work.rows * (work.row_bytes + 10 * 4 * work.d_model)
    # Raw rows are read for the centred rows and for the error. Both are written, and stacked with
    # those of the auxiliary path.
    row = work.gather_bytes * work.d_model
    stacked = 2 * 2 * row * (work.rows + work.aux_rows) if work.auxk else 0.0
    return work.rows * (2 * work.device_row_bytes + 2 * row) + stacked


def _encoder(work: Work, rows: int, latents: int, k: int, hardware: Hardware) -> dict[str, float]:
    """Return the seconds of encoding `rows` rows with top-k over `latents` latents, by part."""
    rates, D = hardware.rates, work.d_model
    product = 2 * rows * latents * D / rates.product_flops
    if work.on_gpu:
        # All segments of the shard are selected from, including those without a member of a subset.
        scanned = work.shard if work.asynchronous else latents
        selected = _selection(rows, scanned, k, rates)
        if work.prefilter == "float8" and is_prefiltered(latents, k):
            count = n_float8_candidates(D, latents, k)
            again = 1 - _CERTIFIED
            rescored = rows * (FIRST_ROUND + _SECOND_ROUND + again) * k * 2 * D
            product *= _FLOAT8_PRODUCT + again
            product += rescored / rates.gather_bytes
            product += latents * D * _SPLIT_BYTES / rates.stream_bytes
            # Only the device knows which rows are encoded again, so all take part in the selection.
            selected += _selection(rows, latents, count, rates)
        return {"encoder": product + selected}
    # A kernel of the CPU ignores its prefilter at sizes to which it does not apply, as in AuxK.
    prefilter = work.prefilter if is_prefiltered(latents, k) else NO_PREFILTER
    depth = _ENCODER_PARTS.get(prefilter, 1)
    if prefilter in _ENCODER_PARTS and hardware.prefiltered is not None:
        rates = hardware.prefiltered
        product = 2 * rows * latents * D / rates.product_flops
    parts = {
        "encoder": product * depth,
        "selection": rows * latents / rates.select + rows * rates.row_s,
    }
    if prefilter in _ENCODER_PARTS:
        parts["split weights"] = latents * D * (4 + 2 * depth) / rates.split_bytes
        candidates = 1.5 * k if depth == 3 else 2 * k
        parts["rescoring"] = rows * candidates * D * 4 / rates.gather_bytes
    return parts


def expected_prefilter(work: Work, train: TrainConfig, hardware: Hardware) -> str:
    """Return the prefilter that `train.prefilter=auto` is expected to choose.

    Ranks choose by measured times; this uses predicted times. On hardware without times it returns
    the prefilter that takes the most memory.
    """
    kernels = default_kernels(hardware.device) if train.kernels == "auto" else train.kernels
    dtype = train.compute_dtype
    if dtype == "auto":
        dtype = "bfloat16" if hardware.device == "cuda" else "float32"
    names = candidates(KERNELS[kernels], hardware.device, dtype)
    if not hardware.timed:
        return names[-1]
    if hardware.prefiltered is None:
        return NO_PREFILTER
    predicted = {
        name: sum(
            _encoder(
                replace(work, prefilter=name), work.rows, work.shard, work.k, hardware
            ).values()
        )
        for name in names
    }
    return fastest(predicted)


def _selection(rows: int, latents: int, k: int, rates: Rates) -> float:
    """Return the seconds of selecting k latents from the key pools of a GPU's encoder."""
    if not k or not latents:
        return 0.0
    width = pool_width(k)
    if width <= LARGEST_NETWORK:
        # A network that keeps the k largest of `width` keys has about width * log2(k)**2 exchanges.
        exchanges = width * math.log2(max(k, 2)) ** 2
        return rows * rates.row_s * exchanges / (pool_width(_ROW_K) * math.log2(_ROW_K) ** 2)
    times = 1 + math.ceil(math.log(max(latents / width, 1), _GROWTH))
    return times * rows * width * _WIDE_BYTES / rates.stream_bytes


def _update(work: Work, hardware: Hardware) -> dict[str, float]:
    """Return the seconds for sorting and summing the active pairs, and for Adam on all rows."""
    rates, D, N = hardware.rates, work.d_model, work.update_pairs
    sums: float = 2 * N * D * work.gather_bytes
    per_weight = 4 * 2 + 2 * work.moment_bytes * 2 + work.copy_bytes
    adam: float = 2 * work.matrix * per_weight
    if work.on_gpu:
        if work.clip:
            sums = 2 * sums  # once for the norm, once for the update
            adam += 4 * work.matrix
    else:
        # Summed gradients are written, projected, and read by Adam and (if clipped) by the norm
        # computation.
        sums += 2 * (4 if work.clip else 3) * work.used * D * 4
    if work.zero_stage:
        adam = 2 * work.matrix * (_ZERO_WHOLE + _ZERO_PART / work.data + work.copy_bytes)
    elif not work.fused:
        adam += 3 * 2 * work.matrix * 4  # dense gradients are also zeroed, written and read
    return {
        "row gradients": sums / rates.sum_bytes + work.update_slots * rates.pair_s,
        "update": adam / rates.update_bytes,
    }
