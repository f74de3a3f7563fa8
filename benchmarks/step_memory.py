"""Memory of the device that a benchmark runs on: what is free, what a block adds at its peak."""

from __future__ import annotations

import gc
from pathlib import Path

import torch

from benchmarks.timing import PeakMemory


class DevicePeak:
    """Memory that a `with` block adds to torch's allocations on the GPU at its peak, in bytes."""

    bytes: int | None = None

    def __enter__(self) -> DevicePeak:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        self._before = torch.cuda.memory_allocated()
        return self

    def __exit__(self, *exc: object) -> None:
        self.bytes = torch.cuda.max_memory_allocated() - self._before


def peak_memory(device: torch.device) -> PeakMemory | DevicePeak:
    """The `with` block that measures on this device."""
    return DevicePeak() if device.type == "cuda" else PeakMemory()


def release(device: torch.device) -> None:
    """Gives back what nothing refers to any more."""
    gc.collect()  # DeepSpeed's engines refer to themselves
    if device.type == "cuda":
        torch.cuda.empty_cache()


def free_bytes(device: torch.device) -> int | None:
    """Bytes that can be taken at this moment; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info()[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    sizes = [int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    return sizes[0] * 1024 if sizes else None
