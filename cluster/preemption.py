"""Preemption: signals by which a scheduler takes the machine back, or a user ends a run.

SIGTERM, SIGUSR1 and SIGINT (Ctrl-C) mean the same. On any of them the driver stops its work or,
while trainer ranks run, asks the ranks through a file in the run folder to save a last checkpoint.
Ranks also handle the signals themselves. The run then ends with exit code 75, and running the same
command again resumes it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from cluster.run_folder.files import STOP_REQUEST
from foundation.errors import EXIT_PREEMPTED

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_BLOCKED = (signal.SIGUSR1,)
"""Signals that are blocked while Ray starts. SIGTERM is not, because Ray uses it to stop
processes."""


class Interrupted(KeyboardInterrupt):
    """The driver received a preemption signal.

    It derives from KeyboardInterrupt so that `except Exception` does not catch it.
    """

    exit_code = EXIT_PREEMPTED


@contextmanager
def on_preemption(action: Callable[[str], None], grace_s: float) -> Iterator[None]:
    """Call `action` in the main thread on the first preemption signal during the block.

    The process ends immediately with exit code 75 on a second signal, or `grace_s` seconds after
    the first. A watcher thread ends it, because the main thread may be stuck in a collective, where
    Python runs no signal handlers. Outside the main thread this function does nothing.

    Args:
        action: Called with the signal's name. If it raises, the exception propagates from whatever
            the main thread is executing.
        grace_s: Seconds from the first signal until the process is ended. The time limit remains
            in force after the block has ended.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    n_signals = 0

    def handle(number: int, _: FrameType | None) -> None:
        nonlocal n_signals
        n_signals += 1
        if n_signals == 1:
            if number == signal.SIGINT:
                # Not `print`, which must not be called from within another call of itself.
                os.write(2, b"\nstopping; press Ctrl-C again to leave at once\n")
            action(signal.Signals(number).name)

    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    threading.Thread(target=_watch, args=(reader, grace_s), daemon=True).start()
    outer_fd = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    # A shell without job control starts background commands with SIGINT ignored on purpose.
    heeded = [number for number in _SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    outer = {number: signal.signal(number, handle) for number in heeded}
    # Ranks inherit a signal mask that blocks SIGUSR1; see `signals_kept`.
    mask = signal.pthread_sigmask(signal.SIG_UNBLOCK, _BLOCKED)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for number, handler in outer.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(outer_fd)
        os.close(writer)


def raise_interrupted(signal_name: str) -> None:
    """Raise `Interrupted`: the preemption action of a process that has nothing to save."""
    raise Interrupted(signal_name)


@contextmanager
def signals_kept() -> Iterator[None]:
    """Restore this process's signal handlers after the block, which starts Ray.

    Ray installs its own handlers. SIGUSR1 is blocked during the block, and the processes that Ray
    starts inherit the blocked signal. Slurm sends SIGUSR1 to all processes of a job step, and it
    would kill Ray's processes, which have no handler, and with them the ranks. Trainer ranks
    unblock SIGUSR1 in `on_preemption`. The signal is blocked rather than ignored, so that if it
    arrives during the block it is delivered afterwards.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    kept = {number: signal.getsignal(number) for number in _SIGNALS}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _BLOCKED)
    try:
        yield
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


class StopRequest:
    """A file in the run folder through which the driver asks the ranks to save and stop.

    The file contains the name of the signal, and is empty while there is no request. It always
    exists, because network file systems may hide a new file for up to a minute, but show an
    existing file's newest content to every process that opens it.

    Args:
        run_dir: Folder of the run.
    """

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / STOP_REQUEST

    def clear(self) -> None:
        """Clear the request of an earlier driver. Called before the ranks start."""
        self._path.write_text("")

    def request(self, signal_name: str) -> None:
        """Ask all ranks to save a checkpoint and exit."""
        self._path.write_text(signal_name)

    @property
    def signal_name(self) -> str:
        """Name of the signal that the driver received, or "" if there is no request."""
        try:
            return self._path.read_text()
        except FileNotFoundError:  # the ranks were started without a driver
            return ""


def leave_at_once(reason: str) -> None:
    """End the process immediately with exit code 75, without waiting for its threads."""
    with contextlib.suppress(OSError, ValueError):
        message = f"preempted: {reason}; run the same command again to resume"
        print(message, file=sys.stderr, flush=True)
    os._exit(EXIT_PREEMPTED)


def _watch(reader: int, grace_s: float) -> None:
    """End the process on a second signal or `grace_s` seconds after the first one.

    Python's wakeup descriptor is the writing end of the pipe, and receives the number of each
    signal. This function returns when the writing end is closed.
    """
    n_signals = 0
    with open(reader, "rb", buffering=0) as numbers:
        while number := numbers.read(1):
            if number[0] not in _SIGNALS:
                continue
            n_signals += 1
            if n_signals == 1:
                timer = threading.Timer(
                    grace_s, leave_at_once, [f"not finished within checkpoint.grace_s={grace_s:g}"]
                )
                timer.daemon = True
                timer.start()
            else:
                leave_at_once("a second signal")
