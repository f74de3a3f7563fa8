"""Time of a step, as a sequence of computations and collectives, each with its duration.

Bytes and operations of the kernels are counted as in benchmarks/notes/kernels.md and cpu.md.
Computations do not overlap with collectives, because the code waits for each collective. Reading
overlaps with the whole step.
"""

from __future__ import annotations

from dataclasses import dataclass

from cluster.planning.hardware import Hardware, shared_among
from cluster.planning.links import collectives, seconds
from cluster.planning.work import Work

_FLOAT8_SPEED = 2.0
"""Speed of the product in float8 divided by its speed in bfloat16."""
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
    looks = 1 if work.on_gpu and work.latent == 1 else 2
    parts: dict[str, dict[str, float]] = {
        "load": {
            "normalise, engine": rates.step_s
            + (B * (work.row_bytes + 10 * 4 * D)) / rates.stream_bytes
        },
        "encode": _encoder(work, B, work.shard, work.k, hardware),
        "decode": {"decode": looks * work.pairs * D * item / rates.gather_bytes},
        # The gradient of the bias needs a pass over the whole encoder matrix.
        "backward": {"bias gradient": 4 * work.matrix / rates.stream_bytes},
        "update": _update(work, hardware),
    }
    if work.auxk:
        aux = _encoder(work, work.aux_rows, work.dead, work.auxk, hardware)
        copied = 2 * work.dead * D * (work.product_bytes if work.on_gpu else 4)
        parts["encode"]["aux encoder"] = sum(aux.values()) + copied / rates.stream_bytes
    return parts


def _encoder(work: Work, rows: int, latents: int, k: int, hardware: Hardware) -> dict[str, float]:
    """Return the seconds of encoding `rows` rows with top-k over `latents` latents, by part."""
    rates, D = hardware.rates, work.d_model
    product = 2 * rows * latents * D / rates.product_flops
    if work.on_gpu:
        if work.prefilter == "float8":
            rescored = rows * 3 * k * 2 * D / rates.gather_bytes
            product = product / _FLOAT8_SPEED + rescored
        return {"encoder": product + rows * rates.row_s}
    depth = _ENCODER_PARTS.get(work.prefilter, 1)
    parts = {
        "encoder": product * depth,
        "selection": rows * latents / rates.select + rows * rates.row_s,
    }
    if work.prefilter in _ENCODER_PARTS:
        parts["split weights"] = latents * D * (4 + 2 * depth) / rates.split_bytes
        candidates = 1.5 * k if depth == 3 else 2 * k
        parts["rescoring"] = rows * candidates * D * 4 / rates.gather_bytes
    return parts


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
        "row gradients": sums / rates.sum_bytes + N * rates.pair_s,
        "update": adam / rates.update_bytes,
    }
