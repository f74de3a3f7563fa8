"""Collectives of a step: the bytes that each rank sends and the seconds that each call takes.

The ranks of a latent group have adjacent indices, and the ranks of a data group are `latent` apart.
A ring within a node runs at the rate of NVLink. Across nodes, the members in a node pool their
network adapters, as in NCCL's rings. The latency of most collectives grows with the logarithm of
the group's size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from cluster.planning.hardware import Hardware, Link
from cluster.planning.work import Work
from sae_core.distributed.global_topk import sent_bytes

_KEY_BYTES = 8
"""Bytes of a selection key, which is a pre-activation with the index of its latent."""
_PAIR_BYTES = 8 + 8 + 4 + 4
"""Bytes of an active pair that replicas exchange: row, latent, value and gradient."""
_SLOT_BYTES = 4 + 4 + 4
"""Bytes of a slot, empty or not, that replicas exchange: latent, value and gradient. All replicas
have the same rows in the same slots."""
_MESSAGE_S = 1e-6
"""Seconds that each peer adds to an all-to-all."""


@dataclass(frozen=True)
class Collective:
    """One call of a collective operation."""

    what: str
    """Data that is exchanged."""
    group: str
    """Group of ranks that exchange it: latent, data or all."""
    kind: str
    """all-reduce, all-gather or all-to-all."""
    sent_bytes: float
    """Bytes that each rank sends or, in an all-gather, receives."""


def collectives(work: Work) -> dict[str, list[Collective]]:
    """Return all collectives of a step, grouped by the part of the step that ends with them.

    These are the parts and the data that they exchange: `load`, the rows; `select`, the k-th keys;
    `decode`, the reconstruction; `backward`, the bias gradient and the flags; `exchange`, the
    gradients of the replicas; and `norm`, the gradient norm.
    """
    G, B, D = work.latent, work.rows, work.d_model
    calls: dict[str, list[Collective]] = {}
    if G > 1:
        share = (G - 1) / G
        calls["load"] = [
            Collective("rows", "latent", "all-gather", B * work.host_row_bytes * share),
            Collective("flag", "latent", "all-reduce", 8),
        ]
        calls["select"] = _selection("selection", B, min(work.k, work.shard), G)
        calls["decode"] = [
            Collective("reconstruction", "latent", "all-reduce", 2 * share * B * D * 4)
        ]
        if work.auxk:
            width = min(work.auxk, work.shard)
            calls["select"] += _selection("aux selection", work.aux_rows, width, G)
            calls["decode"].append(
                Collective(
                    "aux reconstruction", "latent", "all-reduce", 2 * share * work.aux_rows * D * 4
                )
            )
        calls["backward"] = [Collective("bias", "latent", "all-reduce", 2 * share * D * 4)]
        calls["norm"] = [Collective("norm", "latent", "all-reduce", 8)]
    if work.n_ranks > 1:
        calls.setdefault("backward", []).append(Collective("flag", "all", "all-reduce", 8))
    if work.data > 1:
        calls["exchange"] = _exchange(work)
    return calls


def _selection(what: str, rows: int, width: int, n_ranks: int) -> list[Collective]:
    """Return the calls of one top-k selection over the latent group (`global_topk`)."""
    largest = -(-rows // n_ranks)
    thresholds = _KEY_BYTES * largest * (n_ranks - 1)
    keys = sent_bytes(rows, width, n_ranks, 0) - thresholds
    return [
        Collective(what, "latent", "all-to-all", keys),
        Collective(f"{what}, k-th keys", "latent", "all-gather", thresholds),
    ]


def _exchange(work: Work) -> list[Collective]:
    """Return the calls in which data replicas exchange their gradients."""
    others = work.data - 1
    bias = Collective("bias", "data", "all-reduce", 2 * others / work.data * work.d_model * 4)
    if not work.fused:
        dense = 2 * others / work.data * work.parameters * 4
        return [Collective("dense gradients", "data", "all-reduce", dense)]
    own_rows = work.gathered_rows / work.data
    rows = 2 * own_rows * work.d_model * work.gather_bytes * others
    pairs: float = work.pairs * _PAIR_BYTES
    if work.asynchronous:
        pairs = work.slots * _SLOT_BYTES + own_rows * 8  # and each row's number of pairs
    return [
        bias,
        Collective("pairs", "data", "all-gather", pairs * others),
        Collective("inputs and errors", "data", "all-gather", rows),
    ]


def seconds(call: Collective, work: Work, hardware: Hardware) -> float:
    """Return the seconds that a call takes, from when all its ranks have reached it."""
    size, stride = {
        "latent": (work.latent, 1),
        "data": (work.data, work.latent),
        "all": (work.n_ranks, 1),
    }[call.group]
    in_node = _members_in_node(size, stride, hardware.ranks_per_node)
    n_nodes = math.ceil(size / in_node)
    if n_nodes == 1:
        rate = _rate(hardware.node, call.kind)
    elif call.kind == "all-to-all":
        # Only bytes sent to other nodes cross the network, and each rank has its own adapter.
        outside = (size - in_node) / (size - 1)
        rate = _rate(hardware.network, call.kind) / outside
    else:
        rate = min(_rate(hardware.node, call.kind), in_node * _rate(hardware.network, call.kind))
    rounds = math.ceil(math.log2(in_node)) if in_node > 1 else 0
    latency = rounds * hardware.node.latency_s
    if n_nodes > 1:
        latency += math.ceil(math.log2(n_nodes)) * hardware.network.latency_s
    if call.kind == "all-to-all":
        latency += (size - 1) * _MESSAGE_S
    return call.sent_bytes / rate + latency


def crosses_nodes(group: str, work: Work, ranks_per_node: int) -> bool:
    """Return True if the ranks of a latent or data group are on more than one node."""
    size, stride = {"latent": (work.latent, 1), "data": (work.data, work.latent)}[group]
    return _members_in_node(size, stride, ranks_per_node) < size


def _members_in_node(size: int, stride: int, ranks_per_node: int) -> int:
    """Return how many of a group's `size` ranks, `stride` apart, share a node (at least 1)."""
    return max(1, min(size, ranks_per_node // stride))


def _rate(link: Link, kind: str) -> float:
    return {
        "all-reduce": link.bytes_per_s,
        "all-gather": link.gather_bytes_per_s,
        "all-to-all": link.exchange_bytes_per_s,
    }[kind]
