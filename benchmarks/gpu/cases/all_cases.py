"""Part `cases`: the kernel cases of `tests/gpu`, spread over processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.gpu.cases.log import CRASHED, STARTED
from benchmarks.gpu.part import Context
from cluster.run_folder.environment import ROOT

_MOST_WORKERS = 8
_POLL_S = 0.2
_TAIL = 1500
_ENDED_WELL = (0, 1, 5)
"""Exit codes of pytest for: all passed, some failed, none selected."""


@dataclass
class _Worker:
    """One process with its share of the cases. After a crash it is started again."""

    share: str
    """"i/n": this process runs the cases i, i + n, ..."""
    log: Path
    output: Path
    stride: int
    process: subprocess.Popen[bytes] | None = None
    lines: list[dict[str, Any]] = field(default_factory=list)
    lines_at_start: int = 0

    def start(self) -> None:
        command = [sys.executable, "-m", "benchmarks.gpu.cases.worker", "--share", self.share]
        command += ["--stride", str(self.stride), "--log", str(self.log)]
        self.lines_at_start = len(self.lines)
        with open(self.output, "ab") as file:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=dict(os.environ), stdout=file, stderr=file
            )

    def runs(self) -> bool:
        """Return True if the process runs; restart it if it crashed in the middle of a case."""
        assert self.process is not None
        code = self.process.poll()
        self.read()
        if code is None:
            return True
        if code in _ENDED_WELL or len(self.lines) == self.lines_at_start:
            return False
        if self.lines[-1]["outcome"] == STARTED:
            text = self.output.read_text(errors="replace")[-_TAIL:]
            crashed = {"case": self.lines[-1]["case"], "outcome": CRASHED, "text": text}
            with open(self.log, "a") as file:
                file.write(json.dumps({**crashed, "seconds": 0.0}) + "\n")
        self.start()
        return True

    def end(self) -> str:
        """End the process; return the end of its output if it had failed by itself."""
        assert self.process is not None
        code = self.process.poll()
        self.process.kill()
        self.process.wait()
        self.read()
        if code is None or code in _ENDED_WELL:
            return ""
        return self.output.read_text(errors="replace")[-_TAIL:]

    def read(self) -> None:
        if self.log.exists():
            complete = self.log.read_text().rpartition("\n")[0]
            self.lines = [json.loads(line) for line in complete.splitlines()]


def run(context: Context) -> str:
    """Run the cases; report one row for all of them, and one for each that failed."""
    n_workers = min(_MOST_WORKERS, len(os.sched_getaffinity(0)))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        workers = [
            _Worker(
                f"{i}/{n_workers}",
                folder / f"{i}.jsonl",
                folder / f"{i}.txt",
                context.shapes.case_stride,
            )
            for i in range(n_workers)
        ]
        for worker in workers:
            worker.start()
        total = context.report("kernel cases", workers=n_workers)
        reported: set[str] = set()
        while any([worker.runs() for worker in workers]) and context.budget.left_s():
            _update(context, total, workers, reported)
            time.sleep(_POLL_S)
        broken = [worker.end() for worker in workers]
        _update(context, total, workers, reported)
        total["output"] = [output for output in broken if output]
    counts = ", ".join(f"{total[f'n_{name}']} {name}" for name in ("passed", "failed", "skipped"))
    total["passed"] = not total["n_failed"] and not total["output"]
    context.save()
    return f"{counts}, {total['n_not_run']} not run ({total['runner']}, {n_workers} processes)"


def _update(
    context: Context, total: dict[str, Any], workers: list[_Worker], reported: set[str]
) -> None:
    """Count the logged outcomes in the row of all cases; report new failures."""
    lines = [line for worker in workers for line in worker.lines]
    last = {line["case"]: line for line in lines if "case" in line}
    found = Counter(line["outcome"] for line in last.values())
    selected = sum(line["selected"] for line in lines if "selected" in line)
    runners = {line["runner"] for line in lines if "runner" in line}
    failures = [line for line in last.values() if line["outcome"] in ("failed", CRASHED)]
    before = dict(total)
    total.update(
        n_passed=found["passed"],
        n_failed=len(failures),
        n_skipped=found["skipped"],
        n_not_run=max(0, selected - len(last)) + found[STARTED],
        runner=", ".join(sorted(runners)) or None,
        reasons=dict(
            Counter(line["text"] for line in last.values() if line["outcome"] == "skipped")
        ),
    )
    if failures:
        total["passed"] = False
    for line in failures:
        if line["case"] not in reported:
            reported.add(line["case"])
            context.report("kernel case", case=line["case"], text=line["text"], passed=False)
    if total != before:
        context.save()
