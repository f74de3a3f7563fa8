"""Memory of the benchmark's device: how much is free, and how much a block adds at its peak."""

from __future__ import annotations

import gc
from pathlib import Path

import torch

from benchmarks.harness.timing import PeakMemory


class DevicePeak:
    """Measure how much a `with` block adds to torch's GPU allocations at its peak."""

    bytes: int | None = None
    """The result; None before the block ends."""

    def __enter__(self) -> DevicePeak:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        self._before = torch.cuda.memory_allocated()
        return self

    def __exit__(self, *exc: object) -> None:
        self.bytes = torch.cuda.max_memory_allocated() - self._before


def peak_memory(device: torch.device) -> PeakMemory | DevicePeak:
    """Return a context manager that measures the peak memory of a block on `device`."""
    return DevicePeak() if device.type == "cuda" else PeakMemory()


def release(device: torch.device) -> None:
    """Free all memory that is no longer referenced."""
    gc.collect()  # DeepSpeed's engines are part of reference cycles
    if device.type == "cuda":
        torch.cuda.empty_cache()


def free_bytes(device: torch.device) -> int | None:
    """Return the bytes free at this moment; None if the system does not report them."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info()[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    sizes = [int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    return sizes[0] * 1024 if sizes else None
