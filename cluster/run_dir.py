"""The run's folder: one driver at a time, one config for good, and what the machine was like."""

from __future__ import annotations

import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cluster.environment import environment
from cluster.errors import RunDirError
from conf.run_config import forbidden_changes, load_config, save_config
from conf.schema import RunConfig
from sae_core.atomic import write_json

CONFIG, ENVIRONMENT = "config.yaml", "env.json"
_DRIVER_LOCK, _RANKS_LOCK, _TRAINER_LOCK = "driver.lock", "ranks.lock", "trainer.lock"
_OLD_RANKS_TIMEOUT_S = 60.0


@contextmanager
def open_run(
    config: RunConfig, read_only: bool = False, must_exist: bool = False
) -> Iterator[Path]:
    """The run's folder, held for this driver alone while the block runs.

    The lock is the kernel's (`flock`), so one that a killed driver held is free again.

    Args:
        config: composed and valid; written to `config.yaml` on the first call.
        read_only: the stage only looks; nothing is locked or written.
        must_exist: the stage needs what an earlier one left.

    Raises:
        RunDirError: another driver has the run, or the run was started with another config.
    """
    run_dir = Path(config.runs_dir).expanduser().resolve() / config.name
    if must_exist and not (run_dir / CONFIG).exists():
        raise RunDirError(f"{run_dir}: no such run; start it with name={config.name}")
    if read_only:
        yield run_dir
        return
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / "logs").mkdir(exist_ok=True)
    except OSError as error:
        raise RunDirError(f"runs_dir={config.runs_dir}: cannot be written ({error})") from error
    with _driver_lock(run_dir):
        _agree_on_config(config, run_dir)
        if not (run_dir / ENVIRONMENT).exists():
            write_json(run_dir / ENVIRONMENT, environment())
        yield run_dir


def saved_config(run_dir: Path) -> RunConfig | None:
    """The config that the run was started with; None before its first start."""
    path = run_dir / CONFIG
    return load_config(path) if path.exists() else None


def _has_results(run_dir: Path) -> bool:
    """Whether the run holds anything that another config would not have made."""
    made = ("metrics.jsonl", "harvest.json", "checkpoints", "store")
    return any((run_dir / name).exists() for name in made)


def _agree_on_config(config: RunConfig, run_dir: Path) -> None:
    path = run_dir / CONFIG
    saved = saved_config(run_dir)
    if saved is not None and _has_results(run_dir):
        changes = forbidden_changes(saved, config)
        if changes:
            diff = "".join(f"\n  {key}: {old!r} -> {new!r}" for key, (old, new) in changes.items())
            raise RunDirError(
                f"{run_dir} was started with another config:{diff}\n"
                "use another name=..., restore the values, or delete the folder"
            )
    temporary = path.with_suffix(".yaml.tmp")
    save_config(config, temporary)
    os.replace(temporary, path)


@contextmanager
def _driver_lock(run_dir: Path) -> Iterator[None]:
    with open(run_dir / _DRIVER_LOCK, "a+", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            lock.seek(0)
            raise RunDirError(
                f"{run_dir} is in use by {lock.read().strip() or 'another driver'}; "
                "wait for it or end it, or use another name=..."
            ) from error
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}")
        lock.flush()
        yield


@contextmanager
def rank_lock(run_dir: Path, rank: int) -> Iterator[None]:
    """Held by every trainer rank for as long as it may write to the run.

    Shared among the ranks of a group; rank 0 also keeps a second group out, whoever started it.

    Raises:
        RunDirError: rank 0 of another group is training this run.
    """
    with (
        open(run_dir / _RANKS_LOCK, "a", encoding="utf-8") as shared,
        open(run_dir / _TRAINER_LOCK, "a", encoding="utf-8") as alone,
    ):
        fcntl.flock(shared, fcntl.LOCK_SH)
        if rank == 0:
            try:
                fcntl.flock(alone, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise RunDirError(
                    f"{run_dir} is being trained by another group of ranks; wait for it or end it"
                ) from error
        yield


def wait_for_old_ranks(run_dir: Path) -> None:
    """Returns once no rank of an earlier attempt is alive any more.

    A driver that is killed leaves its ranks running for a moment; two sets of ranks must not
    write checkpoints into one folder.

    Raises:
        RunDirError: they are still there after a minute.
    """
    deadline = time.monotonic() + _OLD_RANKS_TIMEOUT_S
    with open(run_dir / _RANKS_LOCK, "a", encoding="utf-8") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError as error:
                if time.monotonic() > deadline:
                    raise RunDirError(
                        f"{run_dir}: trainer ranks of an earlier attempt still run after "
                        f"{_OLD_RANKS_TIMEOUT_S:.0f} s; end them, then run the command again"
                    ) from error
            time.sleep(0.2)
