"""Test that parts run in order within their time, whatever happens to one of them."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from benchmarks.gpu.part import plain
from benchmarks.gpu.parts import PARTS, Part
from benchmarks.gpu.run import Outcome, Stop, run_parts
from foundation.registry import import_attribute

TOYS = "tests.support.toys.gpu_parts"


def toy(name: str, seconds: float = 100.0) -> Part:
    return Part(name, "a toy", seconds, f"{TOYS}:{name}")


def run(parts: list[Part], minutes: float = 5.0, stop: Stop | None = None) -> list[Outcome]:
    return run_parts(parts, minutes, True, stop or Stop(), lambda outcomes: None)


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_every_part_exists_and_has_its_own_name() -> None:
    pytest.importorskip("triton", reason="triton is not installed: pip install triton")
    assert len({part.name for part in PARTS}) == len(PARTS)
    assert all(callable(import_attribute(part.run)) for part in PARTS)
    assert sum(part.seconds for part in PARTS) == 20 * 60


@pytest.mark.slow
def test_a_failure_is_recorded_and_the_next_parts_run(capsys: pytest.CaptureFixture[str]) -> None:
    names = ["fail", "die", "find_wrong", "succeed"]
    failed, died, wrong, good = run([toy(name) for name in names])
    assert (failed.status, failed.error) == ("failed", "ValueError: toy failure in two lines")
    assert failed.traceback is not None and "in fail" in failed.traceback
    assert (
        died.status == "failed" and died.error == f"the process ended with code {-signal.SIGKILL}"
    )
    assert died.traceback is not None and "last words" in died.traceback
    assert [row["op"] for row in failed.rows + died.rows] == ["before", "before"]
    assert (wrong.status, wrong.summary, wrong.bad) == ("wrong", "one is wrong", True)
    assert (good.status, good.summary, good.bad) == ("ok", "all is well", False)
    assert good.rows == [{"op": "check", "passed": True, "ratio": "nan"}]
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == names


@pytest.mark.slow
def test_a_part_is_cut_off_with_its_processes_and_keeps_its_rows() -> None:
    hung, good = run([toy("hang", 30), toy("succeed", 90)], minutes=2)
    assert hung.status == "cut off" and not hung.bad
    assert hung.budget_s <= hung.seconds < hung.budget_s + 20
    assert hung.traceback is not None and "in hang" in hung.traceback  # where it was cut off
    assert not is_alive(hung.rows[0]["child"])
    assert good.status == "ok"


@pytest.mark.slow
def test_a_signal_stops_the_running_part_and_skips_the_others() -> None:
    stop = Stop()
    seen: list[Outcome] = []

    def changed(outcomes: list[Outcome]) -> None:
        if outcomes[0].rows and not seen:
            seen.extend(outcomes)
            threading.Timer(0.0, os.kill, (os.getpid(), signal.SIGTERM)).start()

    before = signal.getsignal(signal.SIGTERM)
    began = time.monotonic()
    with stop.listening():
        outcomes = run_parts([toy("hang"), toy("succeed")], 5, True, stop, changed)
    assert time.monotonic() - began < 120
    assert stop.signal == signal.SIGTERM and signal.getsignal(signal.SIGTERM) == before
    (hung,) = outcomes
    assert hung.status == "stopped" and [row["op"] for row in hung.rows] == ["before"]
    assert not is_alive(hung.rows[0]["child"])


def test_parts_share_the_time_and_need_a_least_one() -> None:
    outcomes = run([toy("succeed", 1), toy("succeed", 3)], minutes=0.02)
    assert [outcome.status for outcome in outcomes] == ["skipped", "skipped"]
    assert "raise --minutes" in outcomes[0].line()
    assert outcomes[0].budget_s == pytest.approx(1.2 / 4, rel=0.1)
    assert outcomes[1].budget_s == pytest.approx(1.2, rel=0.1)  # unused time goes to later parts


def test_numbers_that_json_lacks_become_text() -> None:
    value = plain({1: (float("nan"), float("-inf"), 2.5), "a": [None, True]})
    assert json.loads(json.dumps(value, allow_nan=False)) == {
        "1": ["nan", "-inf", 2.5],
        "a": [None, True],
    }
