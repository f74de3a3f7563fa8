"""One training step, ours and the peers', against the bare encoder GEMM of the same shape.

    python -m benchmarks.step [--work L,D,B,k ...] [--no-peers] [--json FILE]

Ours is measured in this process, each peer in one of its own; every process times the GEMM beside
the step, round by round, and ratios are within a process.
"""

from __future__ import annotations

import argparse
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.peers import peer_rows
from benchmarks.table import format_table, write_json
from benchmarks.timing import PeakMemory, interleaved
from benchmarks.yardstick import encoder_gemms
from sae_core.architectures import build_sae
from sae_core.config import OptimConfig, ParallelConfig, SAEConfig, TrainConfig, TrainerConfig
from sae_core.engine import SAEEngine
from sae_core.kernels import compact, get_kernels
from sae_core.mesh import Mesh

DEFAULT_WORK = "16384,256,1024,32"
DEAD_SHARE = 0.1
"""Share of latents that the rows with AuxK take for dead."""


@dataclass(frozen=True)
class Work:
    """Sizes of one measurement."""

    L: int
    D: int
    B: int
    k: int

    def row(self) -> dict[str, Any]:
        """As the `work` of a benchmark row."""
        return {"L": self.L, "D": self.D, "B": self.B, "k": self.k, "dtype": "float32"}


def main() -> None:
    """Measures, prints the table, writes it when asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", nargs="+", default=[DEFAULT_WORK], metavar="L,D,B,k")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    _start_one_rank()
    rows: list[dict[str, Any]] = []
    for text in options.work:
        work = Work(*map(int, text.split(",")))
        rows += our_rows(work, options.rounds)
        if not options.no_peers:
            rows += peer_rows(work.row(), rounds=options.rounds)
    print(format_table(rows))
    if options.json:
        write_json(options.json, rows)
    dist.destroy_process_group()


def our_rows(work: Work, rounds: int) -> list[dict[str, Any]]:
    """The GEMM, each kernel, and whole steps under DeepSpeed, interleaved."""
    torch.manual_seed(0)
    raw = torch.randn(work.B, work.D)
    calls: dict[str, Callable[[], object]] = {}
    peaks: dict[str, int | None] = {}
    for name, auxk, clip in (
        ("step", False, False),
        ("step + clip", False, True),
        ("step + clip + auxk", True, True),
    ):
        with PeakMemory() as peak:
            call = _step(work, raw, auxk, clip)
            call()
        calls[name], peaks[name] = call, peak.bytes
    W = torch.nn.functional.normalize(torch.randn(work.L, work.D), dim=1)
    calls = encoder_gemms(raw, W, torch.zeros(work.L)) | _kernel_calls(work, raw, W) | calls
    timings = interleaved(calls, rounds=rounds)
    gemm_s = timings["gemm"].median_s
    return [
        {
            "work": work.row(),
            "system": "torch" if name in ("gemm", "linear") else "ours",
            "op": name,
            "median_s": timing.median_s,
            "ratio": timing.median_s / gemm_s,
            "tokens_per_s": work.B / timing.median_s,
            "peak_bytes": peaks.get(name),
        }
        for name, timing in timings.items()
    ]


def _kernel_calls(work: Work, x: torch.Tensor, W: torch.Tensor) -> dict[str, Callable[[], object]]:
    kernels = get_kernels("stock", torch.float32)
    bias = torch.zeros(work.L)
    active = compact(*kernels.encode_topk(x, W, bias, work.k))
    dots = kernels.decoder_dot(x, active, W)
    return {
        "encode + topk": lambda: kernels.encode_topk(x, W, bias, work.k),
        "decode": lambda: kernels.decode(active, W),
        "decoder dot": lambda: kernels.decoder_dot(x, active, W),
        "row gradients": lambda: kernels.row_gradients(active, dots, x, x),
    }


def _step(work: Work, raw: torch.Tensor, auxk: bool, clip: bool) -> Callable[[], object]:
    """A whole training step: forward, backward, clip, Adam, renormalise, ages."""
    config = TrainerConfig(
        SAEConfig(n_latents=work.L, k=work.k, auxk_coef=1 / 32 if auxk else 0.0),
        OptimConfig(lr=1e-6, clip_norm=1.0 if clip else 0.0),
        TrainConfig(tokens=10**12, batch_tokens=work.B),
        ParallelConfig(),
    )
    mesh = Mesh.create("cpu", 1, 1)
    sae = build_sae(config.sae, work.D, mesh, get_kernels("stock", torch.float32), seed=0)
    engine = SAEEngine("sae", sae, config, torch.device("cpu"))
    ages = torch.zeros(work.L, dtype=torch.int64)
    ages[: int(work.L * DEAD_SHARE)] = config.sae.dead_after_tokens

    def call() -> object:
        if auxk:  # those that fire would leave the dead, and the work would shrink
            sae.tokens_since_fired.copy_(ages)
        return engine.train_step(raw, 0)

    return call


def _start_one_rank() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    one_rank = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "DS_ACCELERATOR": "cpu"}
    os.environ.update(one_rank, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo")


if __name__ == "__main__":
    main()
