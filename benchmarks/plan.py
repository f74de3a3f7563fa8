"""Compare the plan's predictions with this machine: step time, peak memory, weak scaling.

    python -m benchmarks.plan --json plan.json

Each case is a run of real ranks (`python -m cluster.rank`) over a real store. The rates that the
plan uses are measured just before each case. `ratio` and `peak_ratio` are the predicted values
divided by the measured ones.
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from activation_store import StoreWriter
from activation_store.config import StoreConfig
from benchmarks.harness.errors import BenchmarkError
from benchmarks.harness.table import format_table, write_json
from cluster.openmp import waiting_variables
from cluster.planning.hardware import Hardware
from cluster.planning.local import measured
from cluster.planning.mesh_search import Layout, plan_layout
from cluster.planning.simulate import Noise, simulate_step
from cluster.run_folder.files import CONFIG
from cluster.run_folder.metrics_log import logged_rows
from cluster.run_folder.saved_config import save_config
from conf.schema.logging import LoggingConfig
from conf.schema.model import ModelConfig
from conf.schema.plan import PlanConfig
from conf.schema.run import RunConfig
from sae_core.config import CheckpointConfig, OptimConfig, ParallelConfig, TopKConfig, TrainConfig

_COLUMNS = ("work", "system", "op", "median_s", "ratio", "tokens_per_s", "peak_bytes", "peak_ratio")
_ITEM_ROWS = 8192
_ITEMS = 4
_REPORT_EVERY = 4


@dataclass(frozen=True)
class Case:
    """Sizes and mesh of one run."""

    op: str
    L: int
    D: int
    B: int
    k: int
    latent: int = 1
    data: int = 1
    zero_stage: int = 0

    @property
    def parallel(self) -> ParallelConfig:
        """The mesh of the run."""
        return ParallelConfig(self.latent, self.data, self.zero_stage)

    @property
    def work(self) -> dict[str, int | str]:
        """The row's `work` column: sizes and mesh."""
        mesh = f"{self.latent}x{self.data}"
        return {"L": self.L, "D": self.D, "B": self.B, "k": self.k, "mesh": mesh}


CASES = (
    Case("one rank", 16384, 256, 1024, 32),
    Case("one rank", 32768, 512, 1024, 32),
    Case("one rank", 32768, 768, 2048, 32),
    *(Case("weak scaling", 8192 * ranks, 512, 1024, 32, ranks) for ranks in (1, 2, 4)),
    *(
        Case(f"replicas, {exchange}", L, 512, B, 32, data=2, zero_stage=stage)
        for L, B in ((2048, 4096), (32768, 512))
        for stage, exchange in ((0, "sparse"), (1, "dense"))
    ),
)


def config_of(case: Case, store: Path, name: str, steps: int) -> RunConfig:
    """Return the config of a run of `steps` steps.

    Dead latents are not planned for, because none can die in so few steps.

    Args:
        case: Sizes and mesh.
        store: Path of a store with rows of width `case.D`.
        name: Name of the run.
        steps: Number of training steps; one checkpoint is saved halfway.
    """
    return RunConfig(
        name=name,
        stage="train",
        model=ModelConfig(hookpoints=["acts"], d_model=case.D),
        store=StoreConfig(path=str(store), buffer_tokens=_ITEM_ROWS, window_items=2),
        sae=TopKConfig(n_latents=case.L, k=case.k),
        optim=OptimConfig(lr=1e-4),
        train=TrainConfig(
            tokens=steps * case.B, batch_tokens=case.B, sample_tokens=4096, device="cpu"
        ),
        parallel=case.parallel,
        checkpoint=CheckpointConfig(every_tokens=steps // 2 * case.B),
        logging=LoggingConfig(wandb="disabled", every_steps=_REPORT_EVERY),
        plan=PlanConfig(dead_fraction=0.0),
    )


def make_store(folder: Path, d_model: int) -> Path:
    """Write a store of sparse sums of fixed directions, unless the store exists; return its path.

    The SAE's latents can find these directions, so training behaves as on real activations.
    """
    path = folder / f"store-{d_model}"
    random = np.random.default_rng(0)
    if path.exists():
        return path
    directions = random.standard_normal((256, d_model), dtype=np.float32)
    writer = StoreWriter(path, {"acts": d_model}, dtype="bfloat16", shard_tokens=_ITEM_ROWS)
    for item in range(_ITEMS):
        weights = random.random((_ITEM_ROWS, 256), dtype=np.float32)
        weights *= random.random((_ITEM_ROWS, 256), dtype=np.float32) < 0.05
        writer.write_item(item, weights @ directions + 1)
    writer.finalise()
    return path


def run_ranks(config: RunConfig, run_dir: Path) -> tuple[float, int]:
    """Run all ranks of a training run until they end.

    Returns:
        Median seconds per step, and the largest peak resident memory of any rank in bytes.

    Raises:
        BenchmarkError: If a rank fails.
    """
    run_dir.mkdir(parents=True)
    save_config(config, run_dir / CONFIG)
    n_ranks = config.parallel.n_ranks
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "cluster.rank", str(run_dir)]
    ranks = []
    for rank in range(n_ranks):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": n_ranks, "MASTER_PORT": port}
        environment = {key: str(value) for key, value in place.items()}
        environment |= {"MASTER_ADDR": "127.0.0.1", "DS_ACCELERATOR": "cpu"}
        environment |= waiting_variables(alone=n_ranks == 1)
        log = open(run_dir / f"rank-{rank}.txt", "w")  # noqa: SIM115 - the child keeps it open
        ranks.append(
            subprocess.Popen(command, env=os.environ | environment, stdout=log, stderr=log)
        )
        log.close()
    peaks = []
    for rank, process in enumerate(ranks):
        _, status, usage = os.wait4(process.pid, 0)
        peaks.append(usage.ru_maxrss * 1024)
        if status:
            text = (run_dir / f"rank-{rank}.txt").read_text()[-2000:]
            raise BenchmarkError(
                f"rank {rank} of {config.name} failed; its output ends with: {text}"
            )
    speeds = [row["tokens_per_s"] for row in logged_rows(run_dir)]
    steps = [config.train.batch_tokens / speed for speed in speeds[1:]]  # the first is a warm-up
    return statistics.median(steps), max(peaks)


def rows_of(case: Case, folder: Path, hardware: Hardware, steps: int) -> list[dict[str, Any]]:
    """Run one case and predict its results; return the measured row and the predicted row.

    Args:
        case: Sizes and mesh.
        folder: Folder for stores and runs.
        hardware: This machine's measured rates.
        steps: Number of training steps.
    """
    store = make_store(folder, case.D)
    op = case.op.replace(",", "").replace(" ", "-")
    name = f"plan-{case.L}-{case.D}-{case.parallel.n_ranks}-{op}"
    config = config_of(case, store, name, steps)
    step_s, peak = run_ranks(config, folder / "runs" / name)
    layout = plan_layout(config, case.D, hardware, config.parallel)
    predicted_s = layout.step_s
    if case.parallel.n_ranks > 1:
        predicted_s = _simulated_step_s(layout)
    predicted = layout.device_total + sum(layout.host.values())
    shared = {"work": case.work, "op": case.op}
    return [
        {
            **shared,
            "system": "measured",
            "median_s": step_s,
            "tokens_per_s": case.B / step_s,
            "peak_bytes": peak,
        },
        {
            **shared,
            "system": "plan",
            "median_s": predicted_s,
            "ratio": predicted_s / step_s,
            "tokens_per_s": case.B / predicted_s,
            "peak_bytes": predicted,
            "peak_ratio": predicted / peak,
            "parts_s": _seconds_by_phase(layout),
            "parts_bytes": layout.device | layout.host,
        },
    ]


def _seconds_by_phase(layout: Layout) -> dict[str, float]:
    """Return the predicted seconds of each kind of phase."""
    parts: dict[str, float] = {}
    for phase in layout.phases:
        parts[phase.what] = parts.get(phase.what, 0.0) + phase.seconds
    return parts


def _simulated_step_s(layout: Layout) -> float:
    """Return the seconds of a step in a simulation with 2% jitter and no slow ranks."""
    mesh = layout.parallel
    noise = Noise(jitter=0.02, slow_ranks=0.0, slow_factor=1.0)
    return simulate_step(layout.phases, mesh.latent, mesh.data, noise, read_s=layout.read_s)


def main() -> None:
    """Run all cases, print the table and write it as JSON with `--json`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    parser.add_argument("--steps", type=int, default=40, help="training steps of each run")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for case in CASES:
            # Calibrate before each case: the load of a shared machine changes.
            hardware = measured(folder)
            rows.append({"op": "calibration", "system": "rates", **_rates(hardware)})
            rows += rows_of(case, folder, hardware, options.steps)
            print(format_table(rows[-2:], _COLUMNS), flush=True)
    print(format_table([row for row in rows if row["system"] != "rates"], _COLUMNS))
    if options.json:
        write_json(options.json, rows)


def _rates(hardware: Hardware) -> dict[str, Any]:
    return {
        "rates": vars(hardware.rates),
        "prefiltered": vars(hardware.prefiltered) if hardware.prefiltered else None,
        "link": vars(hardware.node),
    }


if __name__ == "__main__":
    main()
