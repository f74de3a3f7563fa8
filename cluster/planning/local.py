"""Describe this machine, measured once (`calibrate`) and cached by processor and torch version."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch

from cluster.errors import ClusterError
from cluster.language_model.cache import digest
from cluster.openmp import waiting_variables
from cluster.planning.hardware import GIB, Hardware, Link, Rates, gpu
from cluster.run_folder.environment import hardware as described
from conf.schema.plan import HARDWARE, PlanConfig
from conf.schema.run import RunConfig
from foundation.atomic_files import write_json
from foundation.errors import ConfigError
from foundation.host_memory import total_bytes

_VERSION = 4
"""Version of the measurements. Increment it when they change."""
_ALL_RANKS = 1 << 20
"""Ranks per node. It exceeds the number in any plan, because all ranks share this machine."""
_PROCESS_BYTES = 0.45 * GIB
"""Fixed memory of a rank. After all imports it is 308 MiB. The rest is used by the engine, oneDNN's
scratch memory, the store and the checkpoint writer, and was measured as the memory that remains
after subtracting all counted parts (benchmarks/notes/plan.md)."""


def local(plan: PlanConfig, cache_dir: Path, device: str, *, measure: bool) -> Hardware:
    """Return a description of this machine, from the cache or measured now.

    Args:
        plan: Settings of the plan. They may override measured numbers.
        cache_dir: Folder in which measurements are cached.
        device: `train.device`.
        measure: Whether to measure this machine if the cache has no measurement. If False, hardware
            without times (`timed` is False) is returned instead.

    Raises:
        ConfigError: If `measure` is set and the ranks would train on GPUs of an unknown kind.
    """
    has_gpu = torch.cuda.is_available()
    if device == "cuda" or (device == "auto" and has_gpu):
        return _local_gpu(plan, torch.cuda.get_device_name() if has_gpu else "", measure)
    folder = cache_dir / "hardware"
    key = digest([_VERSION, described(), torch.__version__, torch.get_num_threads()])
    kept = folder / f"{key}.json"
    if kept.is_file():
        hardware = _from_json(json.loads(kept.read_text()))
    elif measure:
        folder.mkdir(parents=True, exist_ok=True)
        hardware = measured(folder)
        write_json(kept, asdict(hardware))
    else:
        hardware = _untimed("cpu", float(total_bytes() or 0))
    # A cached measurement may be of another container on the same machine.
    changes: dict[str, Any] = {"memory_bytes": float(total_bytes() or 0)}
    if plan.memory_gib is not None:
        changes["memory_bytes"] = plan.memory_gib * GIB
    if plan.disk_gb_per_s is not None:
        changes["disk_bytes_per_s"] = plan.disk_gb_per_s * 1e9
    if plan.price_per_hour is not None:
        changes["price_per_hour"] = plan.price_per_hour
    return replace(hardware, **changes)


def _local_gpu(plan: PlanConfig, name: str, measure: bool) -> Hardware:
    """Return the data sheet numbers of this machine's GPU, but with the GPU's actual memory.

    GPUs are not measured.
    """
    kinds = [kind for kind in HARDWARE if kind.upper() in name]
    if not kinds and measure:
        raise ConfigError(
            "plan.hardware",
            plan.hardware,
            "h100, h200 or a100, because the ranks train on GPUs but only CPUs can be measured "
            f"(GPU of this machine: {name or 'none'})",
            "choose the GPU closest to yours and override its data sheet with plan.tflops, "
            "plan.memory_gib and related settings",
        )
    memory = torch.cuda.get_device_properties(0).total_memory if name else 0
    if not kinds:
        return _untimed("cuda", float(memory))
    host_gib = plan.host_memory_gib or (total_bytes() or 0) / GIB
    return gpu(
        replace(
            plan,
            hardware=kinds[0],
            memory_gib=plan.memory_gib or memory / GIB,
            host_memory_gib=host_gib,
        )
    )


def _untimed(device: str, memory: float) -> Hardware:
    """Return hardware of a machine that was not measured, for planning only memory."""
    inf = float("inf")
    rates = Rates(**{f.name: 0.0 if f.name.endswith("_s") else inf for f in fields(Rates)})
    link = Link(inf, inf, inf, 0.0)
    return Hardware(
        name="local",
        device=device,
        rates=rates,
        memory_bytes=memory,
        node=link,
        network=link,
        disk_bytes_per_s=inf,
        price_per_hour=0.0,
        ranks_per_node=_ALL_RANKS,
        process_bytes=_PROCESS_BYTES,
        shared=device == "cpu",
        timed=False,
    )


def measured(folder: Path) -> Hardware:
    """Measure this machine in a new process with the OpenMP settings of a lone rank.

    Args:
        folder: Folder for the results. A temporary file of 64 MiB is also written to it.

    Raises:
        ClusterError: If the measuring process failed.
    """
    answer = folder / f"measured-{os.getpid()}.json"
    command = [sys.executable, "-m", "cluster.planning.calibrate", str(answer)]
    environment = os.environ | waiting_variables(alone=True)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ClusterError(f"measuring this machine failed; its output: {done.stderr[-2000:]}")
    found = json.loads(answer.read_text())
    answer.unlink()
    link = Link(**found["link"])
    return Hardware(
        name="local",
        device="cpu",
        rates=Rates(**found["rates"]),
        memory_bytes=float(total_bytes() or 0),
        node=link,
        network=link,
        disk_bytes_per_s=found["disk_bytes_per_s"],
        price_per_hour=0.0,
        ranks_per_node=_ALL_RANKS,
        process_bytes=_PROCESS_BYTES,
        prefiltered=Rates(**found["prefiltered"]) if found["prefiltered"] else None,
        shared=True,
        peak_flops=found["peak_flops"],
    )


def _from_json(kept: dict[str, Any]) -> Hardware:
    parts: dict[str, Any] = {"rates": Rates(**kept["rates"])}
    if kept["prefiltered"]:
        parts["prefiltered"] = Rates(**kept["prefiltered"])
    links = {name: Link(**kept[name]) for name in ("node", "network")}
    return Hardware(**{**kept, **parts, **links})


def planned_hardware(config: RunConfig, *, measure: bool) -> Hardware:
    """Return the hardware named by `plan.hardware`.

    Args:
        config: Config of the run.
        measure: Whether to measure this machine if plan.hardware=local and it has not been
            measured before.
    """
    if config.plan.hardware != "local":
        return gpu(config.plan)
    cache_dir = Path(config.cache_dir).expanduser()
    return local(config.plan, cache_dir, config.train.device, measure=measure)
