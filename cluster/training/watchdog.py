"""Watchdog of a trainer rank, which writes the stacks and ends the process if the rank hangs.

A rank that hangs stops all others within one step, because they wait for it in a collective. The
watchdogs of all ranks therefore fire at about the same time, and each rank's log shows where that
rank was. A process that is frozen as a whole (by SIGSTOP, or a disk that never answers) can neither
write its stacks nor exit. The driver notices that the process's heartbeat has stopped
(`heartbeats.py`) and kills the process.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

HUNG = "hung"
"""Content of the heartbeat file of a rank that is about to end itself."""
EXIT_DELAY_S = 3.0
"""Seconds between writing the stacks and exiting.

The exit of one rank ends the others, so the delay gives them time to write their stacks first.
"""
_TICK_S = 1.0
"""Maximum number of seconds between two heartbeats."""
_STDERR = 2
"""File descriptor of stderr. `faulthandler` needs one, and `sys.stderr` may have been replaced."""


class Watchdog:
    """A thread that watches the progress of this process while the block runs.

    It checks about once a second, outside the training step, and does not slow the step down. Until
    the first step is done, the limit is `startup_timeout_s` instead of `timeout_s`, to allow for
    imports, compilation, calibration and loading of a checkpoint. If the interpreter itself is
    stuck and holds the GIL, this thread cannot run. A timer of `faulthandler`, which does not need
    the GIL, then writes the stacks and ends the process a little later.

    Args:
        heartbeat: Heartbeat file, rewritten about once a second for the driver, which may be on
            another machine. It holds the number of steps taken by this process, or `HUNG`.
        timeout_s: Seconds without progress after which the process ends with exit code 1.
        startup_timeout_s: The same limit, before the end of the first step. If it is less than
            `timeout_s`, `timeout_s` is used.
    """

    def __init__(self, heartbeat: Path, timeout_s: float, startup_timeout_s: float) -> None:
        self.waits: Callable[[], int] = lambda: 0
        """Function whose result changes while the rank has a reason to wait, either for rows of a
        growing store or for a checkpoint."""
        self._step: Callable[[], int] | None = None
        self._first_step = 0
        self._heartbeat = heartbeat
        self._timeout_s = timeout_s
        self._startup_timeout_s = max(startup_timeout_s, timeout_s)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def start_training(self, step: Callable[[], int]) -> None:
        """Count an increase of `step()`, the number of steps taken, as progress from now on."""
        # Set `_first_step` first, because the watchdog's thread uses it as soon as `_step` is set.
        self._first_step = step()
        self._step = step

    def __enter__(self) -> Watchdog:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Stop watching, because training is over and the remaining work may take any time."""
        self._stop.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        self._heartbeat.unlink(missing_ok=True)

    def _steps_taken(self) -> int:
        return self._step() - self._first_step if self._step is not None else 0

    def _progress(self, seen: tuple[int, int] | None) -> tuple[int, int]:
        try:
            return self._steps_taken(), self.waits()
        except Exception:
            # An error here must not end the thread, because the timer would then kill a healthy
            # rank.
            traceback.print_exc()
            return seen or (0, 0)

    def _watch(self) -> None:
        """Run the thread's loop: compare progress, rewrite the heartbeat, end a hung process."""
        seen: tuple[int, int] | None = None
        since = time.monotonic()
        limit_s = self._startup_timeout_s
        while True:
            now = self._progress(seen)
            if now != seen:
                seen = now
                since = time.monotonic()
                limit_s = self._timeout_s if now[0] else self._startup_timeout_s
                # Restart the timer that ends the process if this thread gets stuck.
                late_s = limit_s + 2 * EXIT_DELAY_S
                faulthandler.dump_traceback_later(late_s, exit=True, file=_STDERR)
            elif time.monotonic() - since > limit_s:
                self._end(limit_s)
            self._beat(str(now[0]))
            if self._stop.wait(min(_TICK_S, self._timeout_s / 4)):
                return

    def _end(self, limit_s: float) -> None:
        self._beat(HUNG)
        print(
            f"{time.strftime('%Y-%m-%d %H:%M:%S')} no progress for {limit_s:g} s (the limit is "
            "train.hang_timeout_s or, before the first step, train.timeout_s if that is longer): "
            "this rank, or one it is waiting for, is hung. Thread stacks:",
            file=sys.stderr,
            flush=True,
        )
        faulthandler.dump_traceback(_STDERR, all_threads=True)
        time.sleep(EXIT_DELAY_S)
        os._exit(1)

    def _beat(self, text: str) -> None:
        with suppress(OSError):  # if the disk is full, the next checkpoint reports it
            self._heartbeat.write_text(text)
