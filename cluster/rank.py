"""One trainer rank. No Ray here: actors, torchrun and the deepspeed launcher all call `run_rank`.

torchrun --nproc-per-node 4 -m cluster.rank runs/demo
"""

from __future__ import annotations

import os
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from activation_store.errors import StoreError
from cluster.cohort import Member, train_members
from cluster.cursor import let_go
from cluster.environment import environment
from cluster.errors import ClusterError, PreemptedError
from cluster.metric_sinks import MetricSinks
from cluster.preemption import EXIT_PREEMPTED, StopRequest, on_preemption
from cluster.pulses import pulse_file
from cluster.run_dir import CONFIG, ENVIRONMENT, rank_lock
from cluster.sweep_config import SweepConfig
from cluster.sweep_record import forget
from cluster.training_line import training_costs
from cluster.watchdog import Watchdog
from conf.run_config import load_config
from conf.schema import RunConfig
from sae_core.atomic import write_json
from sae_core.errors import ConfigError, SAEError
from sae_core.memory import keep_freed_memory

_ENVIRONMENT = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def run_rank(run_dir: Path, console: bool = False, cells: Sequence[str] = ()) -> None:
    """Trains to the end of the run, resuming from its newest valid checkpoint.

    Of a sweep, to the ends of some cells, at once on one stream; what ends one of them before is
    in its folder (`cluster.sweep_record`).

    Where this rank stands comes from RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT.

    Args:
        run_dir: the run's folder with its `config.yaml`, on a file system that all ranks share.
        console: there is no driver: rank 0 prints the progress line itself, and nobody's request
            to stop counts but the signals that ranks get.
        cells: folders in `run_dir`, which is then that of a sweep.

    Raises:
        ClusterError: the environment does not say where this rank stands.
        PreemptedError: this rank or another was asked to stop; there is a checkpoint.
        SAEError, StoreError: config, store, loss or checkpoints are at fault.
    """
    missing = [name for name in _ENVIRONMENT if name not in os.environ]
    if missing:
        raise ClusterError(f"{', '.join(missing)} not set: start ranks with launch.py or torchrun")
    folders = [run_dir / cell for cell in cells] or [run_dir]
    configs = [load_config(folder / CONFIG) for folder in folders]
    limits = load_config(run_dir / CONFIG).sweep if cells else None
    config = configs[0]
    rank, local_rank = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    device = _device(config.train.device, local_rank)
    torch.set_num_threads(_threads(config))
    keep_freed_memory()
    signalled = threading.Event()
    request = StopRequest(run_dir) if rank == 0 and not console else None

    def stop_requested() -> bool:
        return signalled.is_set() or (request is not None and bool(request.made))

    timeouts_s = config.train.hang_timeout_s, config.train.timeout_s
    with (
        on_preemption(lambda _: signalled.set(), config.checkpoint.grace_s),
        _locks({run_dir, *folders}, rank),
        Watchdog(pulse_file(run_dir, rank), *timeouts_s) as watchdog,
    ):
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            timeout=timedelta(seconds=config.train.timeout_s),
        )
        members = []
        try:
            if console and rank == 0:  # elsewhere the driver does it
                for folder in folders:
                    forget(folder)
            for folder, own in zip(folders, configs, strict=True):
                members.append(_member(folder, own, limits, console and not cells))
            outcomes = train_members(members, device, stop_requested, watchdog)
            if not cells and outcomes[0].error is not None:
                raise outcomes[0].error
            dist.barrier()
            watchdog.stop()
            dist.destroy_process_group()
        finally:
            # After the barrier: a wandb that takes its time must not keep the others waiting.
            for member in members:
                if member.sinks is not None:
                    member.sinks.close()
        if console and rank == 0 and not cells:
            if outcomes[0].finished:
                let_go(config, run_dir)
            print(f"train: {training_costs(run_dir)}", flush=True)
    if any(not outcome.finished and outcome.error is None for outcome in outcomes):
        raise PreemptedError(f"{run_dir}: training was asked to stop and has saved a checkpoint")


@contextmanager
def _locks(folders: set[Path], rank: int) -> Iterator[None]:
    with ExitStack() as stack:
        for folder in sorted(folders):
            stack.enter_context(rank_lock(folder, rank))
        yield


def _member(folder: Path, config: RunConfig, limits: SweepConfig | None, console: bool) -> Member:
    if dist.get_rank() != 0:
        return Member(folder, config, None, limits)
    write_json(folder / ENVIRONMENT, environment())
    return Member(folder, config, MetricSinks(config, folder, console), limits)


def _device(name: str, local_rank: int) -> torch.device:
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        os.environ["DS_ACCELERATOR"] = "cpu"
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError("train.device", name, "a machine with CUDA", "use train.device=cpu")
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise ConfigError(
            "parallel.latent x parallel.data",
            local_rank + 1,
            f"at most {count} ranks on this machine, one per device",
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def _threads(config: RunConfig) -> int:
    """Configured, or the machine's cores shared evenly among its ranks."""
    if config.train.threads_per_rank is not None:
        return config.train.threads_per_rank
    local = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, (cores or 1) // local)


def main() -> None:
    """`python -m cluster.rank RUN_DIR [CELL ...]`, once per rank."""
    if len(sys.argv) < 2 or not (Path(sys.argv[1]) / CONFIG).is_file():
        sys.exit(
            f"usage: python -m cluster.rank RUN_DIR [CELL ...], a folder that holds a {CONFIG}"
        )
    try:
        run_rank(Path(sys.argv[1]).resolve(), console=True, cells=sys.argv[2:])
    except PreemptedError as error:
        sys.exit(_say(f"{error}; the same command resumes", EXIT_PREEMPTED))
    except (SAEError, StoreError, ClusterError) as error:
        _leave(_say(f"error: {error}", 1))
    except Exception:
        traceback.print_exc()
        _leave(1)


def _say(message: str, code: int) -> int:
    print(message, file=sys.stderr, flush=True)
    return code


def _leave(code: int) -> None:
    """Without the interpreter's tidying up: it may wait for a save whose other ranks are gone."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
