"""Locks in a run's folder, held by the run's driver and by its trainer ranks.

All of them are `flock` locks, which the kernel releases when the process that holds them ends for
any reason.
"""

from __future__ import annotations

import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cluster.run_folder.errors import RunDirError
from cluster.run_folder.files import DRIVER_LOCK, RANKS_LOCK, TRAINER_LOCK

_OLD_RANKS_TIMEOUT_S = 60.0


@contextmanager
def driver_lock(run_dir: Path) -> Iterator[None]:
    """Hold the lock of the run's driver while the block runs.

    Raises:
        RunDirError: If another driver holds the lock.
    """
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
    group can train the run, no matter how that group was started.

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

    When a driver is killed, its ranks keep running for a moment. Two groups of ranks must not write
    checkpoints to the same folder.

    Raises:
        RunDirError: If some ranks are still alive after a minute.
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
