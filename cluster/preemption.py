"""SIGTERM and SIGUSR1: a scheduler wants the machine back, and says so some time before.

The driver breaks off what it does, or, while trainer ranks run, asks them for a last checkpoint
through a file in the run's folder. Ranks also take the signals themselves. Everything ends with
exit code 75, and the same command resumes.
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

EXIT_PREEMPTED = 75
"""EX_TEMPFAIL: run the same command again."""
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
_BLOCKED = (signal.SIGUSR1,)
"""While Ray starts. Not SIGTERM: Ray ends its processes with it."""
_REQUEST = "stop.request"


class Interrupted(KeyboardInterrupt):
    """The driver got the signal; like Ctrl-C it passes whatever handles errors."""


@contextmanager
def on_preemption(action: Callable[[str], None], grace_s: float) -> Iterator[None]:
    """While the block runs, the first signal calls `action` with its name, in the main thread.

    A second signal, or `grace_s` after the first one, ends the process at once with exit code 75.
    A thread of its own sees to that, for the main thread may be in a collective that never
    returns, where Python runs no handler. Does nothing in another thread than the main one.

    Args:
        action: what it raises is raised where the main thread is.
        grace_s: seconds; counted on after the block.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    calls = 0

    def handle(number: int, _: FrameType | None) -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            action(signal.Signals(number).name)

    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    threading.Thread(target=_watch, args=(reader, grace_s), daemon=True).start()
    outer_fd = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    outer = {number: signal.signal(number, handle) for number in _SIGNALS}
    mask = signal.pthread_sigmask(signal.SIG_UNBLOCK, _BLOCKED)  # a rank, see `signals_kept`
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for number, handler in outer.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(outer_fd)
        os.close(writer)


def raise_interrupted(name: str) -> None:
    """The action of a process that has nothing to save."""
    raise Interrupted(name)


@contextmanager
def signals_kept() -> Iterator[None]:
    """Keeps this process's handlers while the block starts Ray, which installs its own.

    The processes that Ray starts meanwhile have SIGUSR1 blocked until `on_preemption`: Slurm sends
    it to all processes of a job step, and the ones that do not expect it would die of it, the
    trainer ranks with them. Blocked, not ignored: one that comes in these seconds is heard after.
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
    """The driver's word to rank 0, wherever that runs: a file that says which signal came.

    It exists, empty, while nobody asked: ranks read it anew each time, and network file systems
    show a file's newest content to who opens it, but may hide a new file for a minute.

    Args:
        run_dir: the run's folder.
    """

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / _REQUEST

    def withdraw(self) -> None:
        """The driver's first act: what an earlier one asked for is void."""
        self._path.write_text("")

    def make(self, name: str) -> None:
        """Asks all ranks to save and leave."""
        self._path.write_text(name)

    @property
    def made(self) -> str:
        """Name of the signal; empty while there was none."""
        try:
            return self._path.read_text()
        except FileNotFoundError:  # ranks without a driver
            return ""


def leave_at_once(reason: str) -> None:
    """Ends the process with exit code 75, whatever its threads are at."""
    with contextlib.suppress(OSError, ValueError):
        print(f"preempted: {reason}; the same command resumes", file=sys.stderr, flush=True)
    os._exit(EXIT_PREEMPTED)


def _watch(reader: int, grace_s: float) -> None:
    """Reads the numbers of the signals that come, until the other end is closed."""
    came = 0
    with open(reader, "rb", buffering=0) as numbers:
        while number := numbers.read(1):
            if number[0] not in _SIGNALS:
                continue
            came += 1
            if came == 1:
                timer = threading.Timer(
                    grace_s, leave_at_once, [f"not done within checkpoint.grace_s={grace_s:g}"]
                )
                timer.daemon = True
                timer.start()
            else:
                leave_at_once("a second signal")
