"""Time several callables side by side in one process.

Uses only the standard library, because it also runs in the peers' environment.
"""

from __future__ import annotations

import ctypes
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple


class Timing(NamedTuple):
    """Wall-clock seconds of one callable, one sample per round."""

    median_s: float
    best_s: float
    samples_s: tuple[float, ...]


def interleaved(
    callables: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 15,
    warmup: int = 3,
    synchronize: Callable[[], object] | None = None,
    prepare: Callable[[], object] = lambda: None,
) -> dict[str, Timing]:
    """Time every callable once per round, so that drift in machine speed affects all equally.

    Each pair of rounds starts with a different callable, and the second round of a pair runs in
    reverse order. No callable therefore always runs after the same neighbour, whose cache contents
    and pending disk writes would affect its time.

    Args:
        callables: Name -> callable to time; its result is ignored.
        rounds: Number of samples per callable.
        warmup: Number of untimed rounds at the start (allocator, autotuning, lazy optimiser state).
        synchronize: Called before each reading of the clock: `torch.cuda.synchronize` on a GPU.
        prepare: Called before each callable; its time is not counted.

    Returns:
        name -> Timing, in the order of `callables`.

    Raises:
        ValueError: If there are no callables or no rounds.
    """
    if not callables or rounds < 1:
        raise ValueError(
            f"{len(callables)} callables, {rounds} rounds: expected at least 1 of each"
        )
    names = list(callables)
    samples: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(warmup + rounds):
        first = turn // 2 % len(names)
        order = names[first:] + names[:first]
        for name in reversed(order) if turn % 2 else order:
            prepare()
            seconds = _seconds(callables[name], synchronize)
            if turn >= warmup:
                samples[name].append(seconds)
    return {
        name: Timing(statistics.median(taken), min(taken), tuple(taken))
        for name, taken in samples.items()
    }


def _seconds(call: Callable[[], object], synchronize: Callable[[], object] | None) -> float:
    if synchronize is not None:
        synchronize()
    start = time.perf_counter()
    call()
    if synchronize is not None:
        synchronize()
    return time.perf_counter() - start


class PeakMemory:
    """Measure how much resident memory a `with` block adds at its peak.

    Memory that was freed before the block but kept by the C library is first returned to the
    system. Otherwise, the block could reuse this memory without adding to the result.
    """

    bytes: int | None = None
    """The result; None before the block ends, and on systems other than Linux."""

    def __enter__(self) -> PeakMemory:
        _trim_heap()
        self._before = _status_bytes("VmRSS")
        _reset_peak()
        return self

    def __exit__(self, *exc: object) -> None:
        peak = _status_bytes("VmHWM")
        if peak is not None and self._before is not None:
            self.bytes = max(peak - self._before, 0)


def _trim_heap() -> None:
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def _status_bytes(field: str) -> int | None:
    try:
        text = Path("/proc/self/status").read_text()
    except OSError:
        return None
    for line in text.splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    return None


def _reset_peak() -> None:
    """Reset the process's high-water mark; where this is not permitted, leave it as it is."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return
