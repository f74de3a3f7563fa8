"""Test the rules that turn results into things to change."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.gpu.part import Row
from benchmarks.gpu.report.changes import changes
from benchmarks.gpu.run import Outcome

WORK = {"L": 8, "D": 768, "B": 4, "k": 2, "dtype": "bfloat16"}


def found(part: str, *rows: Row, compared: tuple[Row, ...] = (), **more: Any) -> list[str]:
    return changes([Outcome(part, "", rows=list(rows), **more)], compared, interpreted=False)


def encode(candidate: str, ratio: float, default: bool = False) -> Row:
    names = {"shape": "A", "product": "bfloat16", "candidate": candidate}
    return {"op": "encode", **names, "ratio": ratio, "default": default}


BITS = {
    "op": "equal bits",
    "work": WORK,
    "product": "bfloat16",
    "candidate": "128x256",
    "reference": "128x128",
    "differing": 7,
}
RUNS = {"op": "save and resume", "variant": "clip", "path": "plain", "differing": {"W_enc": 3}}


@pytest.mark.parametrize(
    ("part", "row", "expected"),
    [
        (
            "cases",
            {"op": "kernel case", "case": "a::b", "text": "x\nE bad", "passed": False},
            "E bad",
        ),
        ("many", {"op": "linear", "elements": 2**32, "passed": False}, "in pieces"),
        ("exact", {**BITS, "passed": False}, "7 selected pairs differ from those of 128x128"),
        (
            "exact",
            {**BITS, "op": "selection against float64", "error_ratio": 3.0, "passed": False},
            "selects different latents from float64",
        ),
        (
            "exact",
            {**BITS, "op": "candidate runs", "error": "E: no", "passed": False},
            "128x256, D 768 does not run: E: no",
        ),
        ("float8", {"error_ratio": 1.5, "sum_error_ratio": 0.5}, "raise DEVIATIONS"),
        ("float8", {"error_ratio": 0.5, "sum_error_ratio": 4.0}, "raise _TRUNCATED"),
        ("float8", {"error_ratio": "inf", "sum_error_ratio": 0.1}, "inf times its bound"),
        ("resume", {**RUNS, "passed": False}, "resume differs (clip, plain): elements that differ"),
        ("resume", {**RUNS, "op": "equal seeds", "passed": False}, "equal seeds do not repeat"),
        ("resume", {"op": "moves", "variant": "clip", "passed": False}, "not finite"),
        ("sanitizer", {"op": "racecheck", "errors": 2, "passed": False}, "racecheck: 2 errors"),
        (
            "waits",
            {"variant": "clip", "count": 2, "places": {"a.py:3": 2}, "passed": False},
            "the host waits 2 times a step: a.py:3 (2)",
        ),
        ("graph", {"captured": False, "reason": "a wait"}, "no CUDA graph: a wait"),
        ("graph", {"captured": True, "differing": {"b_dec": 1}, "passed": False}, "in b_dec"),
    ],
)
def test_a_finding_names_what_to_change(part: str, row: Row, expected: str) -> None:
    (text,) = found(part, row)
    assert expected in text
    assert found("other", row) == []


def test_a_failed_part_comes_first() -> None:
    texts = found("resume", {**RUNS, "passed": False}, status="failed", error="Error: x")
    assert texts[0].startswith("part resume failed: Error: x") and len(texts) == 2


def test_what_passed_or_was_skipped_changes_nothing() -> None:
    assert found("exact", {**BITS, "passed": True}) == []
    assert found("float8", {"error_ratio": 0.9, "sum_error_ratio": 0.1}, {"skipped": "none"}) == []
    assert found("many", {"op": "linear", "skipped": "needs 30 GiB"}) == []
    assert found("graph", {"op": "graph", "skipped": "needs a CUDA device"}) == []


def test_a_faster_candidate_is_named_if_it_is_clearly_faster() -> None:
    (text,) = found("encode", encode("old", 1.42, True), encode("new", 1.2), encode("bad", 2.0))
    assert "take new (1.20 x product) instead of old (1.42)" in text
    assert found("encode", encode("old", 1.42, True), encode("new", 1.41)) == []
    broken = {key: value for key, value in encode("broken", 0.1).items() if key != "ratio"}
    assert found("encode", encode("old", 1.42, True), {**broken, "error": "E: no"}) == []


def test_costs_above_their_prediction_are_listed_most_expensive_first() -> None:
    step = {"shape": "A", "op": "step", "measured_s": 0.02, "predicted_s": 0.01, "off": 2.0}
    update = {"shape": "B", "op": "row update", "measured_s": 0.5, "predicted_s": 0.1, "off": 5.0}
    good = {"shape": "A", "op": "gemm", "measured_s": 0.01, "predicted_s": 0.01, "off": 1.0}
    memory = {"shape": "C", "op": "step", "plan_bytes": 100 << 30, "peak_bytes": 120 << 30}
    compared = (step, update, good, memory)
    texts = found("step", compared=compared)
    assert [text.split(":")[0] for text in texts] == ["C, step", "B, row update", "A, step"]
    assert "peak 120.0 GiB, planned 100.0" in texts[0]
    assert changes([], compared, interpreted=True) == []
