"""Notices that a trainer rank makes no progress any more, writes its stacks and ends it.

A rank that hangs stops all the others within one step: they wait for it in a collective. So every
rank's own watchdog fires at about the same time, and the logs of all of them say where they stand.
A process that is frozen whole (SIGSTOP, a disk that never answers) can neither write its stacks nor
end; a driver sees that its pulse stands still (`cluster.pulses`), and kills it.
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
"""In the pulse of a rank that ends itself."""
LAST_WORDS_S = 3.0
"""Between the stacks and the end: the death of one rank ends the others, who write theirs first."""
_TICK_S = 1.0
_STDERR = 2
"""The descriptor, as `faulthandler` needs one whatever `sys.stderr` has become."""


class Watchdog:
    """Watches this process from a thread while the block runs.

    It asks for the progress about once a second, so it costs a training step nothing. Until the
    first step is done (imports, compilation, calibration, loading a checkpoint) `startup_timeout_s`
    holds instead of `timeout_s`. Should the interpreter itself be stuck, with its lock held, a
    timer of `faulthandler`, which needs no lock, writes the stacks and ends the process a little
    later.

    Args:
        pulse: file that is rewritten about once a second, for a driver on another machine: steps
            taken by this process, or `HUNG`.
        timeout_s: without progress for so long, the process ends with exit code 1.
        startup_timeout_s: the same before the first step.
    """

    def __init__(self, pulse: Path, timeout_s: float, startup_timeout_s: float) -> None:
        self.waits: Callable[[], int] = lambda: 0
        """A number that changes while the rank rightly waits: for rows of a growing store, or for
        a checkpoint."""
        self._step: Callable[[], int] | None = None
        self._first_step = 0
        self._pulse, self._timeout_s = pulse, timeout_s
        self._startup_timeout_s = max(startup_timeout_s, timeout_s)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def training_begins(self, step: Callable[[], int]) -> None:
        """From now on, progress is that `step`, which gives the steps taken, moves on."""
        self._first_step, self._step = step(), step

    def __enter__(self) -> Watchdog:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Training is over: what comes now may take its time."""
        self._stop.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        self._pulse.unlink(missing_ok=True)

    def _steps_taken(self) -> int:
        return self._step() - self._first_step if self._step is not None else 0

    def _progress(self, seen: tuple[int, int] | None) -> tuple[int, int]:
        try:
            return self._steps_taken(), self.waits()
        except Exception:
            # Without this the thread would end, and the timer then kill a healthy rank.
            traceback.print_exc()
            return seen or (0, 0)

    def _watch(self) -> None:
        seen: tuple[int, int] | None = None
        since, limit_s = time.monotonic(), self._startup_timeout_s
        while True:
            now = self._progress(seen)
            if now != seen:
                seen, since = now, time.monotonic()
                limit_s = self._timeout_s if now[0] else self._startup_timeout_s
                late_s = limit_s + 2 * LAST_WORDS_S
                faulthandler.dump_traceback_later(late_s, exit=True, file=_STDERR)
            elif time.monotonic() - since > limit_s:
                self._end(limit_s)
            self._beat(str(now[0]))
            if self._stop.wait(min(_TICK_S, self._timeout_s / 4)):
                return

    def _end(self, limit_s: float) -> None:
        self._beat(HUNG)
        print(
            f"{time.strftime('%Y-%m-%d %H:%M:%S')} no progress for {limit_s:g} s "
            "(train.hang_timeout_s; before the first step train.timeout_s): this rank hangs, or "
            "one that it waits for; the stacks of its threads:",
            file=sys.stderr,
            flush=True,
        )
        faulthandler.dump_traceback(_STDERR, all_threads=True)
        time.sleep(LAST_WORDS_S)
        os._exit(1)

    def _beat(self, text: str) -> None:
        with suppress(OSError):  # a full disk is told by the checkpoint that fails on it
            self._pulse.write_text(text)
