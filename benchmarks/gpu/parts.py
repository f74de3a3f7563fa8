"""The parts of the command, in order: correctness first. Does not import torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    """One part of the command. It runs in a separate process."""

    name: str
    """Name, as in `--parts`."""
    title: str
    """Purpose of the part."""
    seconds: float
    """Its time in a run of 20 minutes. Longer and shorter runs scale it, and time that earlier
    parts left is shared by the later ones."""
    run: str
    """"module:function" that takes the `Context` and returns a one-line summary."""
    needs_rank: bool = False
    """True if the part needs a process group of one rank, as the trainer's mesh does."""


PARTS: tuple[Part, ...] = (
    Part("device", "versions, bandwidth, products", 40, "benchmarks.gpu.timing.device:run"),
    Part("cases", "the kernel cases of tests/gpu", 220, "benchmarks.gpu.cases.all_cases:run"),
    Part(
        "many",
        "products over more than 2**31 elements",
        60,
        "benchmarks.gpu.checks.many_elements:run",
    ),
    Part(
        "exact",
        "equal bits of the encoder's candidates",
        80,
        "benchmarks.gpu.checks.exact_encoder:run",
    ),
    Part(
        "float8",
        "error of float8 products against its bound",
        40,
        "benchmarks.gpu.checks.float8:run",
    ),
    Part(
        "resume", "equal runs, and save and resume", 100, "benchmarks.gpu.checks.resume:run", True
    ),
    Part("waits", "host waits and kernels of a step", 80, "benchmarks.gpu.timing.waits:run", True),
    Part("graph", "the step as a CUDA graph", 40, "benchmarks.gpu.checks.graph:run", True),
    Part(
        "step",
        "step times relative to the bare product",
        240,
        "benchmarks.gpu.timing.steps:run",
        True,
    ),
    Part(
        "encode", "time of the encoder's candidates", 80, "benchmarks.gpu.timing.encode_sweep:run"
    ),
    Part(
        "sanitizer", "compute-sanitizer on a small step", 120, "benchmarks.gpu.checks.sanitizer:run"
    ),
    Part(
        "largest", "step and peak memory at C", 100, "benchmarks.gpu.timing.steps:run_largest", True
    ),
)
