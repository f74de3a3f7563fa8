"""Entry point of one trainer rank, for Ray actors, torchrun and the deepspeed launcher alike.

This file does not import Ray. To start ranks by hand:

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

from cluster.errors import ClusterError, PreemptedError
from cluster.preemption import StopRequest, on_preemption
from cluster.run_folder.files import CONFIG, rank_heartbeat
from cluster.run_folder.lock import rank_lock
from cluster.run_folder.saved_config import load_config
from cluster.run_folder.starts import record_training
from cluster.run_folder.sweep_record import clear_record
from cluster.training.group import Member, train_members
from cluster.training.metric_sinks import MetricSinks
from cluster.training.progress_line import training_costs
from cluster.training.store_cursor import unregister
from cluster.training.watchdog import Watchdog
from conf.schema.run import RunConfig
from conf.schema.sweep import SweepConfig
from foundation.errors import EXIT_FAILED, EXIT_PREEMPTED, ConfigError, FoundryError
from sae_core.distributed.ranks import is_rank_zero
from sae_core.training.malloc import keep_freed_memory

_ENVIRONMENT = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""Variables that give this rank's place among all ranks. torchrun sets the same variables."""


def run_rank(run_dir: Path, console: bool = False, cells: Sequence[str] = ()) -> None:
    """Train to the end of the run, resuming from its newest valid checkpoint.

    In a sweep, train a group of cells concurrently from one row stream. If a cell ends early, the
    reason is in its folder (`cluster.run_folder.sweep_record`).

    The rank's place among all ranks is read from the environment: RANK, WORLD_SIZE, LOCAL_RANK,
    MASTER_ADDR, MASTER_PORT.

    Args:
        run_dir: The run's folder with its `config.yaml`, on a file system that all ranks share.
        console: Whether the ranks run without a driver. Rank 0 then prints the progress line
            itself, and only a signal to a rank can stop training.
        cells: Names of the cells to train. If given, `run_dir` is the sweep's folder.

    Raises:
        ClusterError: If one of the environment variables is not set.
        PreemptedError: If any rank was asked to stop. A checkpoint has been saved.
        SAEError: If a setting or checkpoint is invalid, or the loss is not finite.
        StoreError: If the store is damaged, incomplete or unreadable.
    """
    missing = [name for name in _ENVIRONMENT if name not in os.environ]
    if missing:
        raise ClusterError(
            f"environment variables not set: {', '.join(missing)}; "
            "start ranks with launch.py or torchrun"
        )
    folders = [run_dir / cell for cell in cells] or [run_dir]
    configs = [load_config(folder / CONFIG) for folder in folders]
    limits = load_config(run_dir / CONFIG).sweep if cells else None
    config = configs[0]
    device = _device(config.train.device, int(os.environ["LOCAL_RANK"]))
    torch.set_num_threads(_threads(config))
    keep_freed_memory()
    signalled = threading.Event()
    stop_request = StopRequest(run_dir) if is_rank_zero() and not console else None

    def stop_requested() -> bool:
        return signalled.is_set() or bool(stop_request and stop_request.signal_name)

    heartbeat = rank_heartbeat(run_dir, int(os.environ["RANK"]))
    with (
        on_preemption(lambda _: signalled.set(), config.checkpoint.grace_s),
        _locks({run_dir, *folders}),
        Watchdog(heartbeat, config.train.hang_timeout_s, config.train.timeout_s) as watchdog,
    ):
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            timeout=timedelta(seconds=config.train.timeout_s),
        )
        if console and is_rank_zero():  # if there is a driver, the driver does this
            for folder in folders:
                clear_record(folder)
        # Sinks are closed after the barrier, so that a slow wandb does not keep the other ranks
        # waiting.
        with ExitStack() as open_sinks:
            members = [
                _member(folder, own, limits, console and not cells, open_sinks)
                for folder, own in zip(folders, configs, strict=True)
            ]
            outcomes = train_members(members, device, stop_requested, watchdog)
            if not cells and outcomes[0].error is not None:
                raise outcomes[0].error
            dist.barrier()
            watchdog.stop()
            dist.destroy_process_group()
        if console and is_rank_zero() and not cells:
            if outcomes[0].finished:
                unregister(config, run_dir)
            print(f"train: {training_costs(run_dir)}", flush=True)
    if any(not outcome.finished and outcome.error is None for outcome in outcomes):
        raise PreemptedError(f"{run_dir}: training was asked to stop and has saved a checkpoint")


@contextmanager
def _locks(folders: set[Path]) -> Iterator[None]:
    with ExitStack() as stack:
        for folder in sorted(folders):
            stack.enter_context(rank_lock(folder, is_rank_zero()))
        yield


def _member(
    folder: Path,
    config: RunConfig,
    limits: SweepConfig | None,
    console: bool,
    open_sinks: ExitStack,
) -> Member:
    """Return a member of the training group. Its metric sinks are closed by `open_sinks`."""
    if not is_rank_zero():
        return Member(folder, config, None, limits)
    record_training(folder)
    sinks = MetricSinks(config, folder, console)
    open_sinks.callback(sinks.close)
    return Member(folder, config, sinks, limits)


def _device(name: str, local_rank: int) -> torch.device:
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        os.environ["DS_ACCELERATOR"] = "cpu"
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError("train.device", name, "a machine with CUDA", "use train.device=cpu")
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise ConfigError(
            "number of ranks on this machine",
            local_rank + 1,
            f"at most {count}, one per CUDA device; lower parallel.latent or parallel.data",
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def _threads(config: RunConfig) -> int:
    """Return `train.threads_per_rank` or, if it is null, an even share of the machine's cores."""
    if config.train.threads_per_rank is not None:
        return config.train.threads_per_rank
    local = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, (cores or 1) // local)


def main() -> None:
    """Run one rank from the command line: `python -m cluster.rank RUN_DIR [CELL ...]`."""
    if len(sys.argv) < 2 or not (Path(sys.argv[1]) / CONFIG).is_file():
        sys.exit(
            "usage: python -m cluster.rank RUN_DIR [CELL ...], where RUN_DIR is a folder that "
            f"contains {CONFIG}"
        )
    try:
        run_rank(Path(sys.argv[1]).resolve(), console=True, cells=sys.argv[2:])
    except PreemptedError as error:
        sys.exit(_report(f"{error}; run the same command again to resume", EXIT_PREEMPTED))
    except FoundryError as error:
        _exit_now(_report(f"error: {error}", EXIT_FAILED))
    except Exception:  # the process ends here; other threads must not keep it alive
        traceback.print_exc()
        _exit_now(1)


def _report(message: str, code: int) -> int:
    """Print a message to stderr and return the exit code."""
    print(message, file=sys.stderr, flush=True)
    return code


def _exit_now(code: int) -> None:
    """Exit without the interpreter's cleanup, which may wait for an abandoned save."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
