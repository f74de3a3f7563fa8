"""One trainer rank. No Ray here: actors, torchrun and the deepspeed launcher all call `run_rank`.

torchrun --nproc-per-node 4 -m cluster.rank runs/demo
"""

from __future__ import annotations

import math
import os
import sys
import threading
import traceback
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from activation_store import open_store
from activation_store.errors import StoreError
from cluster.cursor import RunCursor, let_go
from cluster.environment import environment
from cluster.errors import ClusterError, PreemptedError
from cluster.metric_sinks import MetricSinks
from cluster.preemption import EXIT_PREEMPTED, StopRequest, on_preemption
from cluster.provenance import consumer_name
from cluster.pulses import pulse_file
from cluster.row_share import RowShare
from cluster.run_dir import CONFIG, ENVIRONMENT, rank_lock
from cluster.source import WAIT_TIMEOUT_S, StoreSource
from cluster.trainable import check_store, require_finite
from cluster.training_line import COSTS, training_costs
from cluster.watchdog import Watchdog
from conf.run_config import load_config
from conf.schema import RunConfig
from sae_core.atomic import write_json
from sae_core.checkpoint import agreed_checkpoint
from sae_core.errors import ConfigError, NonFiniteLossError, SAEError
from sae_core.memory import keep_freed_memory
from sae_core.mesh import Mesh
from sae_core.trainer import Trainer

_ENVIRONMENT = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def run_rank(run_dir: Path, console: bool = False) -> None:
    """Trains to the end of the run, resuming from its newest valid checkpoint.

    Where this rank stands comes from RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT.

    Args:
        run_dir: the run's folder with its `config.yaml`, on a file system that all ranks share.
        console: there is no driver: rank 0 prints the progress line itself, and nobody's request
            to stop counts but the signals that ranks get.

    Raises:
        ClusterError: the environment does not say where this rank stands.
        PreemptedError: this rank or another was asked to stop; there is a checkpoint.
        SAEError, StoreError: config, store, loss or checkpoints are at fault.
    """
    missing = [name for name in _ENVIRONMENT if name not in os.environ]
    if missing:
        raise ClusterError(f"{', '.join(missing)} not set: start ranks with launch.py or torchrun")
    config = load_config(run_dir / CONFIG)
    rank, local_rank = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    device = _device(config.train.device, local_rank)
    torch.set_num_threads(_threads(config))
    keep_freed_memory()
    signalled = threading.Event()
    request = StopRequest(run_dir) if rank == 0 and not console else None

    def stop_requested() -> bool:
        return signalled.is_set() or (request is not None and bool(request.made))

    limits = config.train.hang_timeout_s, config.train.timeout_s
    with (
        on_preemption(lambda _: signalled.set(), config.checkpoint.grace_s),
        rank_lock(run_dir, rank),
        Watchdog(pulse_file(run_dir, rank), *limits) as watchdog,
    ):
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            timeout=timedelta(seconds=config.train.timeout_s),
        )
        if rank == 0:
            write_json(run_dir / ENVIRONMENT, environment())
        sinks = MetricSinks(config, run_dir, console) if rank == 0 else None
        try:
            finished = _train(config, run_dir, device, sinks, stop_requested, watchdog)
            dist.barrier()
            watchdog.stop()
            dist.destroy_process_group()
        finally:
            # After the barrier: a wandb that takes its time must not keep the others waiting.
            if sinks is not None:
                sinks.close()
        if console and rank == 0:
            if finished:
                let_go(config, run_dir)
            print(f"train: {training_costs(run_dir)}", flush=True)
    if not finished:
        raise PreemptedError(f"{run_dir}: training was asked to stop and has saved a checkpoint")


def _train(
    config: RunConfig,
    run_dir: Path,
    device: torch.device,
    sinks: MetricSinks | None,
    stop_requested: Callable[[], bool],
    watchdog: Watchdog,
) -> bool:
    """Whether the run has come to its end."""
    mesh = Mesh.create(device.type, config.parallel.latent, config.parallel.data)
    store = open_store(config.store.path)
    array = check_store(config)
    source = StoreSource(
        store,
        array,
        config.seed,
        config.train.batch_tokens,
        mesh.data_rank,
        mesh.n_data,
        config.store.window_items,
        config.store.buffer_tokens,
        device,
        # The driver sees when a harvest beside the trainer fails, and ends the ranks.
        wait_timeout_s=math.inf if config.cluster.mode == "concurrent" else WAIT_TIMEOUT_S,
        share=RowShare.of(mesh, config.train.timeout_s),
    )
    watchdog.waits = lambda: source.waits
    trainer_config = replace(config.trainer, sae=replace(config.sae, hookpoint=array))
    # Before the sample: what it reads must not be deleted by others meanwhile.
    cursor = _cursor(config, run_dir, source) if sinks is not None else None
    try:
        trainer = Trainer(
            trainer_config,
            mesh,
            source,
            run_dir / "checkpoints",
            config.seed,
            report=sinks.write if sinks is not None else lambda row: None,
            report_every=config.logging.every_steps,
            stop_requested=stop_requested,
        )
        watchdog.waits = lambda: source.waits + trainer.saver.waits
        newest = agreed_checkpoint(run_dir / "checkpoints", config.checkpoint.verify_hashes)
        if newest is None:
            trainer.calibrate()
        else:
            trainer.resume(newest)
        watchdog.training_begins(lambda: trainer.step)
        finished = trainer.train()
        if sinks is not None:
            write_json(run_dir / COSTS, trainer.costs)
        if cursor is not None and finished:
            cursor.finish()
        return finished
    except NonFiniteLossError:
        # Rows that came after the start may be the cause, which says more than the loss does.
        store.refresh()
        require_finite(store, array)
        raise
    finally:
        source.close()


def _cursor(config: RunConfig, run_dir: Path, source: StoreSource) -> RunCursor | None:
    if config.cluster.mode != "concurrent":
        return None
    cursor = RunCursor(
        config.store.path,
        consumer_name(config, run_dir),
        source,
        run_dir / "checkpoints",
        keep_everything=config.cluster.retention == "keep",
    )
    source.before_next = cursor.publish
    return cursor


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
    """`python -m cluster.rank RUN_DIR`, once per rank."""
    if len(sys.argv) != 2 or not (Path(sys.argv[1]) / CONFIG).is_file():
        sys.exit(f"usage: python -m cluster.rank RUN_DIR, a folder that holds a {CONFIG}")
    try:
        run_rank(Path(sys.argv[1]).resolve(), console=True)
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
