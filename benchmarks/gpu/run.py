"""Run the parts one after the other, each in its own process and within its own time."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from benchmarks.gpu.part import Row
from benchmarks.gpu.parts import Part
from cluster.run_folder.environment import ROOT

LEAST_S = 2.0
"""A part that would get less time is skipped: importing torch alone takes longer."""
_POLL_S = 0.2
_GRACE_S = 3.0
"""Time between SIGTERM and SIGKILL."""
_TAIL = 4000
"""Characters kept of a failed part's output."""


@dataclass
class Outcome:
    """Result of one part."""

    part: str
    title: str
    status: str = "running"
    """`ok`; `wrong` (a check failed); `failed` (an exception, or the process died); `cut off` (out
    of its time); `stopped` (by a signal); `skipped` (no time was left)."""
    seconds: float = 0.0
    budget_s: float = 0.0
    summary: str = ""
    rows: list[Row] = field(default_factory=list)
    error: str | None = None
    traceback: str | None = None

    @property
    def bad(self) -> bool:
        """True if the part failed or found something wrong."""
        return self.status in ("wrong", "failed")

    def line(self) -> str:
        """Return the part's line of result."""
        time_s = f"{self.seconds:6.1f} of {self.budget_s:5.1f} s"
        return f"{self.part:9}  {self.status:7}  {time_s}  {self.error or self.summary}"


class Stop:
    """Remembers the first SIGTERM or SIGINT."""

    signal: int | None = None

    @contextmanager
    def listening(self) -> Iterator[Stop]:
        """Listen inside a `with` block, and restore the handlers after it."""
        numbers = (signal.SIGTERM, signal.SIGINT)
        before = {number: signal.signal(number, self._note) for number in numbers}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = self.signal or number


def run_parts(
    parts: Sequence[Part],
    minutes: float,
    interpreted: bool,
    stop: Stop,
    changed: Callable[[list[Outcome]], None],
) -> list[Outcome]:
    """Run the parts until the time is over or a signal stops them.

    Args:
        parts: The parts, in order.
        minutes: Time for all parts.
        interpreted: Run tiny shapes on the CPU with Triton's interpreter.
        stop: Says whether a signal has come.
        changed: Called with all outcomes so far, after each part and whenever a running part has
            reported new rows.

    Returns:
        One outcome per part; those after a signal are missing.
    """
    until = time.monotonic() + 60 * minutes
    outcomes: list[Outcome] = []
    for place, part in enumerate(parts):
        if stop.signal is not None:
            break
        rest = sum(later.seconds for later in parts[place:])
        budget_s = max(0.0, until - time.monotonic()) * part.seconds / rest
        outcome = Outcome(part.name, part.title, budget_s=budget_s)
        outcomes.append(outcome)
        if budget_s < LEAST_S:
            outcome.status, outcome.error = "skipped", "no time left: raise --minutes"
        else:
            _run_one(part, outcome, interpreted, stop, lambda: changed(outcomes))
        print(outcome.line(), flush=True)
        changed(outcomes)
    return outcomes


def _run_one(
    part: Part, outcome: Outcome, interpreted: bool, stop: Stop, changed: Callable[[], None]
) -> None:
    """Run one part in a process; fill in its outcome."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        result, output = Path(folder) / "result.json", Path(folder) / "output.txt"
        process = _start(part, outcome.budget_s, interpreted, result, output)
        seen = 0
        cut = ""
        try:
            while process.poll() is None and not cut:
                time.sleep(_POLL_S)
                outcome.seconds = time.monotonic() - began
                if stop.signal is not None:
                    cut = "stopped"
                elif outcome.seconds > outcome.budget_s:
                    cut = "cut off"
                stamp = result.stat().st_mtime_ns if result.exists() else 0
                if stamp != seen:
                    seen = stamp
                    outcome.rows = _read(result).get("rows", [])
                    changed()
        finally:
            end_group(process)
        outcome.seconds = time.monotonic() - began
        _fill(outcome, _read(result), output.read_text(errors="replace"))
        outcome.status = _status(outcome, process.returncode, cut)


def _start(
    part: Part, budget_s: float, interpreted: bool, result: Path, output: Path
) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "benchmarks.gpu.child", part.run]
    command += ["--result", str(result), "--seconds", str(budget_s)]
    if part.needs_rank:
        command.append("--rank")
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    if interpreted:
        command.append("--interpret")
        environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    with open(output, "wb") as file:
        # In a new session, so that the process and its children can be ended together.
        return subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=file, stderr=file, start_new_session=True
        )


def end_group(process: subprocess.Popen[bytes]) -> None:
    """End a process that leads its own session, and all processes of that session."""
    for number, wait_s in ((signal.SIGTERM, _GRACE_S), (signal.SIGKILL, _GRACE_S)):
        try:
            os.killpg(process.pid, number)
        except (ProcessLookupError, PermissionError):  # all of them have ended
            break
        try:
            process.wait(wait_s)
        except subprocess.TimeoutExpired:
            continue
    process.wait()


def _read(result: Path) -> dict[str, Any]:
    """Return the content of a part's result file; {} if it has written none."""
    if not result.exists():
        return {}
    content: dict[str, Any] = json.loads(result.read_text())
    return content


def _fill(outcome: Outcome, content: dict[str, Any], output: str) -> None:
    outcome.rows = content.get("rows", [])
    checks = [row for row in outcome.rows if "passed" in row]
    passed = sum(bool(row["passed"]) for row in checks)
    plain = f"{len(outcome.rows)} rows, {passed} of {len(checks)} checks passed"
    outcome.summary = content.get("summary") or plain
    outcome.error = content.get("error")
    outcome.traceback = content.get("traceback")
    if "summary" not in content and outcome.traceback is None:
        outcome.traceback = output[-_TAIL:] or None


def _status(outcome: Outcome, code: int, cut: str) -> str:
    wrong = any(row.get("passed") is False for row in outcome.rows)
    if cut and outcome.error is None:
        return "wrong" if wrong else cut
    if code and outcome.error is None:
        outcome.error = f"the process ended with code {code}"
    if outcome.error is not None:
        return "failed"
    return "wrong" if wrong else "ok"
