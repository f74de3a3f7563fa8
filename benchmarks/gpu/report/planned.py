"""Predictions of `stage=plan` for the steps of the step table: time and peak memory."""

from __future__ import annotations

from dataclasses import dataclass, replace

from benchmarks.gpu.report.counts import Rates
from benchmarks.gpu.report.predictions import OPTIONS
from benchmarks.step.work import Work as Sizes
from cluster.planning.hardware import gpu
from cluster.planning.memory import device_bytes
from cluster.planning.step_time import schedule, step_seconds
from cluster.planning.work import work_of
from conf.schema.plan import PlanConfig
from conf.schema.run import RunConfig
from sae_core.config import OptimConfig, TopKConfig, TrainConfig

_DEAD_SHARE = 0.1


@dataclass(frozen=True)
class Planned:
    """The plan of one step."""

    step_s: float
    peak_bytes: float
    """Memory of SAE, optimiser and step, without the process and the loader."""


def planned(op: str, sizes: Sizes, rates: Rates) -> Planned | None:
    """Plan a step of the step table on one GPU; None for other operations.

    Args:
        op: Name of the operation.
        sizes: Workload.
        rates: The GPU, whose name selects the plan's hardware.
    """
    if op not in OPTIONS:
        return None
    options = OPTIONS[op]
    hardware = replace(gpu(PlanConfig(hardware=rates.name.lower())), process_bytes=0.0)
    config = RunConfig(
        sae=TopKConfig(
            n_latents=sizes.L,
            k=sizes.k,
            auxk_coef=TopKConfig().auxk_coef if options.auxk_share else 0.0,
            auxk_rows=options.auxk_share or 1.0,
        ),
        optim=OptimConfig(
            clip_norm=1.0 if options.clip else 0.0,
            moments="bfloat16" if options.moment_bytes == 2 else "float32",
        ),
        train=TrainConfig(batch_tokens=sizes.B, prefilter="float8" if options.float8 else "none"),
        plan=PlanConfig(dead_fraction=_DEAD_SHARE),
    )
    work = work_of(config, sizes.D, on_gpu=True)
    # The benchmark's batch is a float32 tensor on the device: no store, loader or sample.
    work = replace(work, row_bytes=4 * sizes.D, buffer_rows=0, chunk_rows=0, sample_rows=0)
    return Planned(
        step_seconds(schedule(work, hardware)), sum(device_bytes(work, hardware).values())
    )
