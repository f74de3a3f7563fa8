"""Measures this machine's kernels, the link between two ranks, and its disk, in a few seconds.

The training step's own kernels run on one shape that no cache holds; each part's rate is its count
of work over its time.
"""

from __future__ import annotations

import os
import statistics
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from cluster.planning.hardware import Link, Rates
from sae_core.atomic import write_json
from sae_core.kernels import AdamStep, RowState, SparseGradient, compact, get_kernels
from sae_core.kernels.prefilter_bfloat16 import weight_parts
from sae_core.kernels.stock_encode import streamed_topk
from sae_core.memory import keep_freed_memory

_L, _D, _B, _K = 16384, 512, 1024, 32
_DEPTH = {"bfloat16x3": 3, "bfloat16": 1}
_ROUNDS = 9
_LINK_ELEMENTS = 2 << 20
_FILE_BYTES = 64 << 20
_STEP_S = 6e-3
"""Fixed cost of a step of two threads: about 200 calls, DeepSpeed's bookkeeping, metrics."""


def main() -> None:
    """`python -m cluster.planning.calibrate FILE`: writes what it found to FILE, as JSON."""
    answer = Path(sys.argv[1])
    keep_freed_memory()  # as a rank does
    rates, prefilter, peak_flops = _rates()
    found = {
        "rates": asdict(rates),
        "prefilter": prefilter,
        "peak_flops": peak_flops,
        "link": asdict(_link()),
        "disk_bytes_per_s": _disk(answer.parent),
    }
    write_json(answer, found)


@torch.no_grad()
def _rates() -> tuple[Rates, str, float]:
    """Rates of the stock kernels, the prefilter that they take, bfloat16 FLOP/s."""
    kernels: Any = get_kernels("stock", torch.float32, prefilter="auto")
    prefilter = "none" if kernels.prefilter is None else kernels.prefilter.name
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(_L, _D, generator=generator) / _D**0.5
    x = torch.randn(_B, _D, generator=generator)
    depth, dtype = _DEPTH.get(prefilter, 1), torch.float32
    inputs, weights = x, W
    split_bytes = float("inf")
    if prefilter != "none":
        dtype = torch.bfloat16
        inputs = torch.cat([x.to(dtype)] * depth, 1)
        split_bytes = _L * _D * (4 + 2 * 3) / _seconds(lambda: weight_parts(W))
        weights = weight_parts(W).view(_L, 3 * _D)[:, : depth * _D].contiguous()
    bias = torch.zeros(_L)
    product_s = _seconds(lambda: _product(inputs, weights, bias))
    pre_acts = _product(inputs, weights, bias)
    count = _K + _K // 2 if depth == 3 else 2 * _K
    select_s = _seconds(lambda: streamed_topk(lambda a, b: pre_acts, _B, _L, count, x.device))
    latents = torch.randint(_L, (_B, _K), generator=generator)
    active = compact(torch.ones(_B, _K), latents)
    decode_s = _seconds(lambda: kernels.decode_error(x, active, W))
    gradient = SparseGradient(active, torch.ones(_B * _K), x, x)
    sums_s = _seconds(lambda: kernels.row_update(gradient, W))
    used = len(latents.unique())
    update_s = _update_seconds(kernels, gradient, W)
    large = torch.empty(_L, _D)
    stream_s = _seconds(lambda: torch.add(W, W, out=large))
    flops = 2 * _B * _L * _D * depth / product_s
    rates = Rates(
        product_flops=flops,
        split_bytes=split_bytes,
        select=_B * _L / select_s,
        row_s=0.0,
        gather_bytes=2 * _B * _K * _D * 4 / decode_s,
        sum_bytes=(2 * _B * _K * _D * 4 + 6 * used * _D * 4) / sums_s,
        update_bytes=2 * _L * _D * 24 / update_s,
        stream_bytes=3 * _L * _D * 4 / stream_s,
        pair_s=0.0,
        step_s=_STEP_S,
    )
    return rates, prefilter, flops


def _product(x: torch.Tensor, W: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, W, b, "none", [], "")
    return out


def _update_seconds(kernels: Any, gradient: SparseGradient, W: torch.Tensor) -> float:
    def rows() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return torch.zeros(_L, _D), torch.zeros(_L, _D), torch.zeros(_L)

    state = RowState(W.clone(), W.clone(), torch.zeros(_L), rows(), rows(), None, 0)
    zero = torch.zeros(())
    adam = AdamStep(1e-4, 0.9, 0.999, 1e-8, zero + 1, None, zero)
    update = kernels.row_update(gradient, W)
    return _seconds(lambda: update.apply(state, adam))


def _seconds(call: Callable[[], object]) -> float:
    """The median, as of training steps, after a first call, which touches the memory."""
    call()
    taken = []
    for _ in range(_ROUNDS):
        began = time.perf_counter()
        call()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def _link() -> Link:
    """gloo between two ranks of this machine: two threads here, over the loopback."""
    c10d: Any = dist  # its stubs do not know what the objects can do
    store, groups = c10d.HashStore(), {}

    def join(rank: int) -> None:
        groups[rank] = c10d.ProcessGroupGloo(store, rank, 2, timedelta(seconds=30))

    def both(call: Callable[[int], object]) -> None:
        threads = [threading.Thread(target=call, args=(rank,)) for rank in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    both(join)
    n = _LINK_ELEMENTS
    small = [torch.ones(1) for _ in range(2)]
    own = [torch.ones(n) for _ in range(2)]
    whole = [torch.ones(2 * n) for _ in range(2)]

    def latency(rank: int) -> None:
        for _ in range(20):
            groups[rank].allreduce([small[rank]]).wait()

    def exchange(rank: int) -> None:
        groups[rank].alltoall_base(whole[rank][:n], own[rank], [], []).wait()

    reduce_s = _seconds(lambda: both(lambda rank: groups[rank].allreduce([own[rank]]).wait()))
    gather_s = _seconds(
        lambda: both(lambda rank: groups[rank]._allgather_base(whole[rank], own[rank]).wait())
    )
    exchange_s = _seconds(lambda: both(exchange))
    return Link(
        n * 4 / reduce_s, n * 4 / gather_s, n * 2 / exchange_s, _seconds(lambda: both(latency)) / 20
    )


def _disk(folder: Path) -> float:
    """Bytes a second of a file that the page cache does not hold, where the system can be asked."""
    path = folder / f"read-{os.getpid()}.tmp"
    try:
        with open(path, "wb") as file:
            file.write(os.urandom(1 << 20) * (_FILE_BYTES >> 20))
            file.flush()
            os.fsync(file.fileno())
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        began = time.perf_counter()
        path.read_bytes()
        return _FILE_BYTES / (time.perf_counter() - began)
    finally:
        path.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
