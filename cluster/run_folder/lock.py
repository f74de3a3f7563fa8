"""The run's folder: its locks, its saved config and a record of the environment."""

from __future__ import annotations

import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cluster.run_folder.environment import environment
from cluster.run_folder.errors import RunDirError
from cluster.run_folder.files import (
    CHECKPOINTS,
    CONFIG,
    DRIVER_LOCK,
    ENVIRONMENT,
    HARVEST,
    LOGS,
    METRICS,
    RANKS_LOCK,
    STORE,
    TRAINER_LOCK,
)
from cluster.run_folder.saved_config import forbidden_changes, load_config, save_config
from conf.schema.run import RunConfig
from foundation.atomic_files import write_json

_OLD_RANKS_TIMEOUT_S = 60.0


@contextmanager
def open_run(
    config: RunConfig, read_only: bool = False, must_exist: bool = False
) -> Iterator[Path]:
    """Create the run's folder if needed, and lock it for this driver while the block runs.

    The kernel holds the lock (`flock`), so it is released even if the driver is killed.

    Args:
        config: the composed and validated config; written to `config.yaml` on the first call.
        read_only: whether the stage only reads; then nothing is locked or written.
        must_exist: whether the stage needs the results of an earlier one.

    Yields:
        The run's folder.

    Raises:
        RunDirError: If another driver has the lock, the run was started with another config, it
            must exist and does not, or its folder is not writable.
    """
    run_dir = Path(config.runs_dir).expanduser().resolve() / config.name
    if must_exist and not (run_dir / CONFIG).exists():
        raise RunDirError(f"{run_dir}: no such run; start it with name={config.name}")
    if read_only:
        yield run_dir
        return
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / LOGS).mkdir(exist_ok=True)
    except OSError as error:
        raise RunDirError(
            f"runs_dir={config.runs_dir}: expected a writable folder ({error})"
        ) from error
    with _driver_lock(run_dir):
        _agree_on_config(config, run_dir)
        if not (run_dir / ENVIRONMENT).exists():
            write_json(run_dir / ENVIRONMENT, environment())
        yield run_dir


def saved_config(run_dir: Path) -> RunConfig | None:
    """Return the config that the run was started with, or None if it was never started."""
    path = run_dir / CONFIG
    return load_config(path) if path.exists() else None


def _has_results(run_dir: Path) -> bool:
    """Return whether the run has results that depend on its config."""
    made = (METRICS, HARVEST, CHECKPOINTS, STORE)
    return any((run_dir / name).exists() for name in made)


def _agree_on_config(config: RunConfig, run_dir: Path) -> None:
    """Save the config, unless the run already has results made with a different one.

    Raises:
        RunDirError: If it has; the error lists the differences.
    """
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
    # Written to a temporary file and renamed, so that a reader never sees half a config.
    temporary = path.with_suffix(".yaml.tmp")
    save_config(config, temporary)
    os.replace(temporary, path)


@contextmanager
def _driver_lock(run_dir: Path) -> Iterator[None]:
    with open(run_dir / DRIVER_LOCK, "a+", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            lock.seek(0)
            raise RunDirError(
                f"{run_dir} is in use by {lock.read().strip() or 'another driver'}; "
                "wait for it to finish, stop it, or use another name=..."
            ) from error
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}")
        lock.flush()
        yield


@contextmanager
def rank_lock(run_dir: Path, is_rank_zero: bool) -> Iterator[None]:
    """Hold a trainer rank's lock on the run for as long as the rank may write to it.

    All ranks of a group share one lock. Rank 0 also takes an exclusive lock, so that no second
    group can train the run, however it was started.

    Raises:
        RunDirError: If rank 0 of another group is training this run.
    """
    with (
        open(run_dir / RANKS_LOCK, "a", encoding="utf-8") as shared,
        open(run_dir / TRAINER_LOCK, "a", encoding="utf-8") as alone,
    ):
        fcntl.flock(shared, fcntl.LOCK_SH)
        if is_rank_zero:
            try:
                fcntl.flock(alone, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise RunDirError(
                    f"{run_dir} is being trained by another group of ranks; wait for it to finish, "
                    "or stop it"
                ) from error
        yield


def wait_for_old_ranks(run_dir: Path) -> None:
    """Wait until no rank of an earlier attempt is alive.

    The ranks of a killed driver run on for a moment, and two groups of ranks must not write
    checkpoints into the same folder.

    Raises:
        RunDirError: If some are still alive after a minute.
    """
    deadline = time.monotonic() + _OLD_RANKS_TIMEOUT_S
    with open(run_dir / RANKS_LOCK, "a", encoding="utf-8") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError as error:
                if time.monotonic() > deadline:
                    raise RunDirError(
                        f"{run_dir}: trainer ranks of an earlier attempt are still running after "
                        f"{_OLD_RANKS_TIMEOUT_S:.0f} s; stop them, then rerun the command"
                    ) from error
            time.sleep(0.2)
