"""Models of the machines to plan for: how fast one rank computes and moves data, and its price.

The rates of GPUs are peaks from data sheets, multiplied by the share that is reached in practice.
This project has not measured them. The hardware `local` is measured (`local.py`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from conf.schema.plan import PlanConfig

GIB = 2**30
_PRODUCT_SHARE = 0.8
"""Share of the peak that a large bfloat16 product reaches: 790 of 989 TFLOP/s in cuBLAS on
Hopper."""
_MEMORY_SHARE = 0.9
_NVLINK_SHARE = 0.8
"""Share of the peak that NCCL's all-reduce reaches: about 360 of 450 GB/s inside an H100 node."""
_NETWORK_SHARE = 0.9
_EPILOGUE = 1.3
"""Time of the encoder divided by the time of its matrix product alone. benchmarks/notes/kernels.md
predicts 1.24 at d_model 4096 and 1.4 to 1.5 at 768, and at best 1.01 to 1.02."""


@dataclass(frozen=True)
class Rates:
    """Work that one rank does per second, and its fixed costs in seconds."""

    product_flops: float
    """FLOP/s of the encoder's product, including its filter."""
    split_bytes: float
    """Bytes per second when converting the encoder to a prefilter's low precision."""
    select: float
    """Pre-activations per second that the top-k selection examines. Infinite on GPUs, where the
    product's kernel makes the selection."""
    row_s: float
    """Seconds for the final selection of one batch row."""
    gather_bytes: float
    """Bytes per second when fetching and adding up the dictionary rows of active (row, latent)
    pairs."""
    sum_bytes: float
    """Bytes per second when summing active pairs into row gradients."""
    update_bytes: float
    """Bytes per second when Adam updates all rows."""
    stream_bytes: float
    """Bytes per second in elementwise operations."""
    pair_s: float
    """Seconds for sorting one active pair."""
    step_s: float
    """Fixed cost of a step in seconds: kernel launches, the engine, scalars."""


@dataclass(frozen=True)
class Link:
    """Speed of the collectives over one kind of connection between ranks."""

    bytes_per_s: float
    """Bytes per second that a rank sends in an all-reduce, in one direction."""
    gather_bytes_per_s: float
    """Bytes per second that a rank receives in an all-gather."""
    exchange_bytes_per_s: float
    """Bytes per second that a rank sends in an all-to-all."""
    latency_s: float
    """Latency of one round of a collective, in seconds."""


@dataclass(frozen=True)
class Hardware:
    """The hardware of one rank, described in bytes and seconds."""

    name: str
    """Name, as written in `plan.hardware`."""
    device: str
    """cuda or cpu."""
    rates: Rates
    """Speed of computation."""
    memory_bytes: float
    """Memory of a GPU. For local CPU ranks, memory of the whole machine, which the ranks share."""
    node: Link
    """Connection between ranks of a node."""
    network: Link
    """Connection between nodes."""
    disk_bytes_per_s: float
    """Bytes per second that one node reads from the disks."""
    price_per_hour: float
    """US dollars per rank and hour, or 0 if unknown."""
    ranks_per_node: int
    """Maximum number of ranks in a node."""
    process_bytes: float
    """Bytes that a rank's process holds before it trains. On a GPU: the CUDA context and NCCL."""
    prefiltered: Rates | None = None
    """On a CPU that supports the bfloat16 prefilters and was measured: rates with one of them. Only
    those of the encoder differ. `Rates.product_flops` is then that of the product in bfloat16."""
    host_memory_bytes: float = 0.0
    """Memory of a GPU rank's node, which its ranks share, or 0 if unknown. On the CPU,
    `memory_bytes` counts instead."""
    shared: bool = False
    """True if the rates and links describe the whole machine and are shared by its ranks."""
    peak_flops: float = 0.0
    """Peak dense bfloat16 FLOP/s, for the language model."""
    timed: bool = True
    """True if the rates are known. Otherwise only memory can be planned."""


@dataclass(frozen=True)
class _Gpu:
    """Peaks of a GPU. A field of the same name in `PlanConfig` may override each of them."""

    tflops: float
    memory_gib: float
    memory_gb_per_s: float
    nvlink_gb_per_s: float
    network_gb_per_s: float
    price_per_hour: float


# Peaks are from NVIDIA's data sheets of the SXM modules (bfloat16 without sparsity, NVLink at half
# of the bidirectional figure). The network is that of the DGX of the same generation, with one
# ConnectX per GPU at 400 Gb/s (A100: 200 Gb/s). Prices are typical of on-demand clouds. Set
# plan.price_per_hour to the price that you pay.
_GPUS = {
    "h100": _Gpu(989, 79.6, 3350, 450, 50, 3.0),
    "h200": _Gpu(989, 139.8, 4800, 450, 50, 3.8),
    "a100": _Gpu(312, 79.3, 2039, 300, 25, 1.8),
}
_DISK_GB_PER_S = 10.0
"""Assumed read bandwidth of a node: a few NVMe disks, or its share of a parallel file system."""
_GPU_PROCESS_BYTES = 1.5 * GIB
"""Assumed size of the CUDA context, NCCL's buffers and cuBLAS' workspace."""


def gpu(plan: PlanConfig) -> Hardware:
    """Return the GPU named by `plan.hardware`, with the user's overrides."""
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
            # Issue slots of the top-k selection on Hopper (benchmarks/notes/kernels.md), scaled to
            # other GPUs by their peak.
            row_s=0.4e-3 / 32768 * 989 / chip.tflops,
            gather_bytes=memory,
            sum_bytes=memory,
            update_bytes=memory,
            stream_bytes=memory,
            pair_s=0.2e-9 * 4300 / chip.memory_gb_per_s,
            # About 180 operations of 3 microseconds on the device; the host does not delay them.
            step_s=0.5e-3,
        ),
        memory_bytes=chip.memory_gib * GIB,
        node=Link(nvlink, nvlink, nvlink, 15e-6),
        network=Link(network, network, network, 30e-6),
        disk_bytes_per_s=(plan.disk_gb_per_s or _DISK_GB_PER_S) * 1e9,
        price_per_hour=chip.price_per_hour,
        ranks_per_node=plan.gpus_per_node,
        process_bytes=_GPU_PROCESS_BYTES,
        host_memory_bytes=(plan.host_memory_gib or 0) * GIB,
        peak_flops=chip.tflops * 1e12,
    )


def shared_among(hardware: Hardware, n_ranks: int) -> Hardware:
    """Return the hardware available to each of `n_ranks` ranks of one machine.

    The ranks of a CPU machine share its rates and links. A GPU belongs to one rank, so a GPU's
    numbers do not change.
    """
    if not hardware.shared or n_ranks == 1:
        return hardware
    prefiltered = None
    if hardware.prefiltered is not None:
        prefiltered = _divided(hardware.prefiltered, n_ranks)
    # The links were measured with two ranks, so two ranks get their full speed.
    pairs = n_ranks / 2
    link = Link(
        hardware.node.bytes_per_s / pairs,
        hardware.node.gather_bytes_per_s / pairs,
        hardware.node.exchange_bytes_per_s / pairs,
        hardware.node.latency_s * pairs,
    )
    rates = _divided(hardware.rates, n_ranks)
    return replace(hardware, rates=rates, prefiltered=prefiltered, node=link, network=link)


def _divided(rates: Rates, n_ranks: int) -> Rates:
    """Return the part of a machine's rates that each of its ranks gets."""
    parts = {
        name: value * n_ranks if name.endswith("_s") else value / n_ranks
        for name, value in vars(rates).items()
    }
    return Rates(**parts)
