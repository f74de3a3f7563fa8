"""The machines that a plan is for: what one rank computes, moves and costs.

Rates of GPUs are peaks of data sheets times the share that is reached in practice; none of it was
measured by this project. `local` is measured (`local.py`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from cluster.planning.config import PlanConfig

GIB = 2**30
_PRODUCT_SHARE = 0.8
"""Of a GPU's peak in a large bfloat16 product: 790 of 989 TFLOP/s, as cuBLAS gives it on Hopper."""
_MEMORY_SHARE = 0.9
_NVLINK_SHARE = 0.8
"""NCCL's all-reduce reaches about 360 of 450 GB/s inside an H100 node."""
_NETWORK_SHARE = 0.9
_EPILOGUE = 1.2
"""Encoder over bare product; benchmarks/NOTES-kernels.md predicts 1.1 to 1.35."""


@dataclass(frozen=True)
class Rates:
    """What one rank does in a second, and what a call costs beside its work."""

    product_flops: float
    """Of the encoder, its filter included."""
    split_bytes: float
    """Bringing the encoder into the product's low-precision form; of a prefilter only."""
    select: float
    """Pre-activations looked at; GPUs do that within the product."""
    row_s: float
    """Seconds for each batch row's final selection."""
    gather_bytes: float
    """Dictionary rows fetched for pairs, and their sums."""
    sum_bytes: float
    """Summing pairs into row gradients."""
    update_bytes: float
    """Adam over all rows."""
    stream_bytes: float
    """Elementwise work."""
    pair_s: float
    """Seconds for sorting one pair."""
    step_s: float
    """Fixed cost of a step: launches, the engine, scalars."""


@dataclass(frozen=True)
class Link:
    """Between ranks."""

    bytes_per_s: float
    """That a rank sends in an all-reduce, one direction."""
    gather_bytes_per_s: float
    """That a rank receives in an all-gather."""
    exchange_bytes_per_s: float
    """That a rank sends in an all-to-all."""
    latency_s: float
    """Of one round of a collective."""


@dataclass(frozen=True)
class Hardware:
    """One rank's share of its machine; bytes and seconds."""

    name: str
    device: str
    """cuda or cpu."""
    rates: Rates
    memory_bytes: float
    """Of a GPU; of the whole machine for local, whose ranks share it."""
    node: Link
    network: Link
    disk_bytes_per_s: float
    """Of one node."""
    price_per_hour: float
    ranks_per_node: int
    process_bytes: float
    """What a rank's process holds before it trains: on a GPU, context and NCCL."""
    prefilter: str = "none"
    """What `train.prefilter=auto` is there."""
    shared: bool = False
    """Rates and links are the machine's, and its ranks share them."""
    peak_flops: float = 0.0
    """Dense bfloat16, for the language model."""
    timed: bool = True
    """False: the rates are not known, only what decides about memory."""


@dataclass(frozen=True)
class _Gpu:
    tflops: float
    memory_gib: float
    memory_gb_per_s: float
    nvlink_gb_per_s: float
    network_gb_per_s: float
    price_per_hour: float


# Peaks: NVIDIA's data sheets of the SXM modules (dense bfloat16, without sparsity; NVLink: half of
# the bidirectional figure). Network: the DGX of that generation, one ConnectX per GPU at 400 Gb/s
# (A100: 200 Gb/s). Prices: the order of what on-demand clouds ask; plan.price_per_hour sets yours.
_GPUS = {
    "h100": _Gpu(989, 79.6, 3350, 450, 50, 3.0),
    "h200": _Gpu(989, 139.8, 4800, 450, 50, 3.8),
    "a100": _Gpu(312, 79.3, 2039, 300, 25, 1.8),
}
_DISK_GB_PER_S = 10.0
"""Of a node: a few NVMe disks, or its part of a parallel file system. An assumption."""
_GPU_PROCESS_BYTES = 1.5 * GIB
"""CUDA context, NCCL's buffers, cuBLAS' workspace. An assumption."""


def gpu(plan: PlanConfig) -> Hardware:
    """The hardware that `plan.hardware` names, with the numbers that the user knows better."""
    table = _GPUS[plan.hardware]
    changed = {name: getattr(plan, name) for name in vars(table) if getattr(plan, name) is not None}
    chip = replace(table, **changed)
    memory = chip.memory_gb_per_s * 1e9 * _MEMORY_SHARE
    nvlink = chip.nvlink_gb_per_s * 1e9 * _NVLINK_SHARE
    network = chip.network_gb_per_s * 1e9 * _NETWORK_SHARE
    return Hardware(
        name=plan.hardware,
        device="cuda",
        rates=Rates(
            product_flops=chip.tflops * 1e12 * _PRODUCT_SHARE / _EPILOGUE,
            split_bytes=memory,
            select=float("inf"),
            # Issue slots of `select` on Hopper, scaled by the clock's product; NOTES-kernels.md.
            row_s=0.4e-3 / 32768 * 989 / chip.tflops,
            gather_bytes=memory,
            sum_bytes=memory,
            update_bytes=memory,
            stream_bytes=memory,
            pair_s=0.2e-9 * 4300 / chip.memory_gb_per_s,
            step_s=1e-3,
        ),
        memory_bytes=chip.memory_gib * GIB,
        node=Link(nvlink, nvlink, nvlink, 15e-6),
        network=Link(network, network, network, 30e-6),
        disk_bytes_per_s=(plan.disk_gb_per_s or _DISK_GB_PER_S) * 1e9,
        price_per_hour=chip.price_per_hour,
        ranks_per_node=plan.gpus_per_node,
        process_bytes=_GPU_PROCESS_BYTES,
        peak_flops=chip.tflops * 1e12,
    )


def shared_among(hardware: Hardware, n_ranks: int) -> Hardware:
    """The hardware as each of `n_ranks` ranks of one machine sees it; a GPU is nobody else's."""
    if not hardware.shared or n_ranks == 1:
        return hardware
    rates = {
        name: value * n_ranks if name.endswith("_s") else value / n_ranks
        for name, value in vars(hardware.rates).items()
    }
    # The links were measured between two ranks.
    pairs = n_ranks / 2
    link = Link(
        hardware.node.bytes_per_s / pairs,
        hardware.node.gather_bytes_per_s / pairs,
        hardware.node.exchange_bytes_per_s / pairs,
        hardware.node.latency_s * pairs,
    )
    return replace(hardware, rates=Rates(**rates), node=link, network=link)
