"""Measure this machine: the kernels of a step, the link between two ranks, and the disk.

The kernels of a training step run one after the other, with arrays too large for any cache. The
rate of each part of a step is the part's amount of work divided by its time.
"""

from __future__ import annotations

import os
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from cluster.planning.hardware import Link, Rates
from foundation.atomic_files import write_json
from sae_core.kernels import AdamStep, RowState, SparseGradient, compact, get_kernels
from sae_core.kernels.stock.encode import streamed_topk
from sae_core.kernels.stock.prefilter_bfloat16 import weight_parts
from sae_core.training.malloc import keep_freed_memory

_L, _D, _B, _K = 32768, 512, 1024, 32
"""Shape of the measured step: latents, d_model, batch rows, active latents per row."""
_DEPTH = {"bfloat16x3": 3, "bfloat16": 1}
"""Number of bfloat16 parts into which each prefilter splits a weight."""
_ROUNDS = 9
"""Number of repetitions of each measurement, of which the median is used."""
_LINK_ELEMENTS = 2 << 20
"""Number of float32 elements that a rank contributes to a measured collective."""
_FILE_BYTES = 64 << 20
"""Size of the file that is read to measure the disk."""
_STEP_S = 6e-3
"""Fixed cost of a step with two threads, for about 200 calls, DeepSpeed's bookkeeping and
metrics."""


def main() -> None:
    """Measure this machine and write the results as JSON.

    Usage: `python -m cluster.planning.calibrate FILE`.
    """
    answer = Path(sys.argv[1])
    keep_freed_memory()  # trainer ranks do the same
    rates = _rates("none")
    prefiltered = None
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        prefiltered = _rates("bfloat16x3")
    found = {
        "rates": asdict(rates),
        "prefiltered": asdict(prefiltered) if prefiltered else None,
        "peak_flops": max(r.product_flops for r in (rates, prefiltered) if r is not None),
        "link": asdict(_link()),
        "disk_bytes_per_s": _disk(answer.parent),
    }
    write_json(answer, found)


@torch.no_grad()
def _rates(prefilter: str) -> Rates:
    """Return the stock kernels' rates with a prefilter, or with `none`."""
    measured = _MeasuredStep(prefilter)
    # Drop the first round, because its times include the first touch of the memory.
    rounds = [measured.step() for _ in range(1 + _ROUNDS)][1:]
    taken = {part: statistics.median(one[part] for one in rounds) for part in rounds[0]}
    depth = measured.depth
    pairs = _B * _K
    used = measured.used
    split_bytes = float("inf")
    if measured.prefilter != "none":
        split_bytes = _L * _D * (4 + 2 * depth) / taken["split"]
    gathered = (measured.n_candidates + 2 * pairs) * _D * 4
    return Rates(
        product_flops=2 * _B * _L * _D * depth / taken["product"],
        split_bytes=split_bytes,
        select=_B * _L / taken["select"],
        row_s=0.0,
        gather_bytes=gathered / (taken["rescore"] + taken["decode"]),
        sum_bytes=(2 * pairs * _D * 4 + 8 * used * _D * 4) / taken["sums"],
        update_bytes=2 * _L * _D * 24 / taken["update"],
        stream_bytes=_L * _D * 4 / taken["stream"],
        pair_s=0.0,
        step_s=_STEP_S,
    )


class _MeasuredStep:
    """The kernels of a training step, run in the order of a step and timed individually.

    A kernel that is repeated on its own finds its data in a cache. In a real step, the other
    kernels evict that data.
    """

    def __init__(self, prefilter: str) -> None:
        generator = torch.Generator().manual_seed(0)
        self.kernels = get_kernels("stock", torch.float32)
        self.prefilter = prefilter
        self.depth = _DEPTH.get(self.prefilter, 1)
        self.W_enc = torch.randn(_L, _D, generator=generator) / _D**0.5
        self.bias = torch.zeros(_L)
        self.norms = torch.zeros(_L)
        self.x = torch.randn(_B, _D, generator=generator)
        latents = torch.randint(_L, (_B, _K), generator=generator)
        self.active = compact(torch.ones(_B, _K), latents)
        self.used = len(latents.unique())
        self.count = _K
        if self.prefilter != "none":
            self.count = _K + _K // 2 if self.depth == 3 else 2 * _K
        self.n_candidates = _B * self.count if self.prefilter != "none" else 0
        candidates = torch.randint(_L, (_B, self.count), generator=generator)
        self.candidates = compact(torch.ones(_B, self.count), candidates)

        def rows() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            return torch.zeros(_L, _D), torch.zeros(_L, _D), torch.zeros(_L)

        W_dec = self.W_enc / self.W_enc.norm(dim=1, keepdim=True)
        self.state = RowState(self.W_enc, W_dec, self.bias, rows(), rows(), None, 0)
        self.taken: dict[str, float] = {}

    def step(self) -> dict[str, float]:
        """Run the kernels once and return the seconds that each part took."""
        self.taken = dict.fromkeys(("split", "product", "select", "rescore"), 0.0)
        with self._clock("select"):
            streamed_topk(self._product, _B, _L, self.count, self.x.device)
        # `streamed_topk` calls `_product`, whose two timed parts do not belong to the selection.
        self.taken["select"] -= self.taken["split"] + self.taken["product"]
        if self.prefilter != "none":
            with self._clock("rescore"):
                self.kernels.decoder_dot(self.x, self.candidates, self.W_enc)
        with self._clock("decode"):
            self.kernels.decode_error(self.x, self.active, self.state.W_dec)
        with self._clock("stream"):
            torch.ones(_L) @ self.W_enc
        gradient = SparseGradient(self.active, torch.ones(_B * _K), self.x, self.x, _B)
        with self._clock("sums"):
            update = self.kernels.row_update(gradient, self.state.W_dec)
            update.square()
        zero = torch.zeros(())
        with self._clock("update"):
            update.apply(self.state, AdamStep(1e-4, 0.9, 0.999, 1e-8, zero + 1, None, zero))
        return self.taken

    def _product(self, start: int, stop: int) -> torch.Tensor:
        """Return pre-activations [B, stop - start] of latents [start, stop), timing both parts."""
        weights = self.W_enc[start:stop]
        if self.prefilter != "none":
            with self._clock("split"):
                if self.depth == 3:
                    weights = weight_parts(weights, self.norms[start:stop])
                else:
                    weights = weights.bfloat16()
        x = self.x if self.prefilter == "none" else torch.cat([self.x.bfloat16()] * self.depth, 1)
        with self._clock("product"):
            out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(
                x, weights, self.bias[start:stop], "none", [], ""
            )
        return out

    @contextmanager
    def _clock(self, part: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.taken[part] = self.taken.get(part, 0.0) + time.perf_counter() - began


def _seconds(call: Callable[[], object]) -> float:
    """Return the median time of a call, after an untimed first call that touches the memory."""
    call()
    taken = []
    for _ in range(_ROUNDS):
        began = time.perf_counter()
        call()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def _link() -> Link:
    """Measure Gloo between two ranks of this machine: two threads that use the loopback."""
    c10d: Any = dist  # torch's stubs lack some methods of these objects
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
    """Return the bytes per second at which a file that is not in the page cache is read.

    On systems without `posix_fadvise` the file may be cached, which makes the rate too high.
    """
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
