"""Test the counts and predictions of steps, and the table that compares them with measurements."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from benchmarks.gpu.part import Row
from benchmarks.gpu.report.compare import COLUMNS, comparison, device_of
from benchmarks.gpu.report.counts import (
    BEST,
    EXPECTED,
    SELECT_INSTRUCTIONS,
    SLOTS_PER_MISS,
    SPLIT_INSTRUCTIONS,
    Count,
    Options,
    step_counts,
)
from benchmarks.gpu.report.planned import planned
from benchmarks.gpu.report.predictions import (
    H100,
    H200,
    OPTIONS,
    auxk_share,
    counts_of,
    parts_table,
    predict,
    rates_of,
    step_ratio,
    summary_table,
)
from benchmarks.gpu.run import Outcome
from benchmarks.gpu.shapes import GPU
from benchmarks.harness.table import format_table
from benchmarks.step.ours import FLOAT8_VARIANT, VARIANTS
from benchmarks.step.work import Work
from tests.support.paths import ROOT

A, B, C = GPU.steps["A"], GPU.steps["B"], GPU.largest["C"]


def predicted(op: str, work: Work = A) -> float:
    seconds = predict(op, work, H200)
    assert seconds is not None
    return seconds


BEFORE = {"A": 6.75, "B": 28.8, "C": 95.1}
"""Milliseconds of a step without the product and its epilogue, before bytes and launches were
saved: counted at commit 82f49c7 with other assumptions, also about launches."""


def part(work: Work, name: str, options: Options = OPTIONS["step + clip"]) -> Count:
    (found,) = (count for count in step_counts(work, options, EXPECTED) if count.part == name)
    return found


def test_a_part_takes_the_longest_of_its_resources_and_its_launches() -> None:
    rates = replace(H200, flop_per_s=100.0, bytes_per_s=10.0, slots_per_s=1.0, launch_s=0.5)
    assert Count("", flop=300, n_bytes=20, launches=2).seconds(rates) == 3 + 1
    assert Count("", flop=300, n_bytes=50).seconds(rates) == 5
    assert Count("", flop=300, n_bytes=50, slots=7).seconds(rates) == 7


def test_rates_follow_the_name_of_the_device() -> None:
    assert rates_of("NVIDIA H200") == H200
    assert rates_of("NVIDIA H100 80GB HBM3") == H100
    assert rates_of("NVIDIA A100-SXM4-80GB") is None
    assert H100.bytes_per_s / H200.bytes_per_s == pytest.approx(3.35 / 4.8)


def test_the_bare_product_is_counted_exactly() -> None:
    (count,) = counts_of("gemm", A) or []
    assert (count.flop, count.launches) == (2 * 32768 * 131072 * 768, 1)


def test_the_work_besides_the_product_is_less_than_it_was() -> None:
    encoder = ("filter and keys", "exposed epilogue")
    for name, work in {"A": A, "B": B, "C": C}.items():
        counts = step_counts(work, OPTIONS["step + clip"], EXPECTED)
        rest = sum(count.seconds(H200) for count in counts if count.part not in encoder)
        assert 0.5 * BEFORE[name] < 1e3 * rest < BEFORE[name]


def test_large_parts_are_counted_by_hand() -> None:
    """C: 2**20 latents, 4096 columns, 2**21 slots."""
    weights, slots = 2**32, 2**21
    pairs = 2 * 2 * slots * 4096  # bfloat16 rows of x and of the error
    assert part(C, "update").n_bytes == 26 * 2 * weights + pairs + 24 * slots + 40 * 2**20
    small = part(C, "update", Options(moment_bytes=2))
    assert part(C, "update").n_bytes - small.n_bytes == 8 * 2 * weights
    assert part(C, "norm").n_bytes == 4 * weights + pairs + 24 * slots + 24 * 2**20
    partial = 2 * 4 * weights / 128
    bias = part(C, "bias gradient").n_bytes
    assert bias == 2 * weights + partial + 12 * slots + 16 * 2**20
    # Decoder rows of 8 KiB are read twice from memory, those of 1.5 KiB (A) once.
    dense = 2**15 * 4096 * 6.5
    assert part(C, "decode and error").n_bytes == 2 * slots * 8192 + dense + 32 * slots
    assert part(A, "decode and error").n_bytes == 2**20 * (1536 + 32) + 2**15 * 768 * 6.5


def test_the_norm_is_counted_with_clipping_only() -> None:
    plain = {count.part for count in counts_of("step", A) or []}
    assert {count.part for count in counts_of("step + clip", A) or []} - plain == {"norm"}


def test_the_product_has_the_segments_of_the_encoder() -> None:
    """A: 256 latents give keys; tiles for many keys then go to 4096, those for few to the end.

    At 4096 latents, k = 32 of which reached the threshold, a tile of 256 gives a row 2 keys.
    """
    flop = 2 * 2**15 * 768
    expected = flop * (4096 / EXPECTED.many + (131072 - 4096) / EXPECTED.wide)
    found = part(A, "filter and keys")
    assert found.flop == pytest.approx(expected)
    assert found.launches == 4 + 5
    epilogue = part(A, "exposed epilogue")
    values = 2**15 * (131072 - 4096) / 32 * SLOTS_PER_MISS
    # A key costs 25 slots, and a vote and a branch for each of its group of four. There are 3 k
    # keys in a segment three times what was seen before.
    hits = (25 + 2 * 4) * 2**15 * 32 * (3 + 3 + 1)
    assert epilogue.slots == pytest.approx((values + hits) / EXPECTED.issue)
    assert not [c for c in step_counts(A, Options(), BEST) if c.part == "exposed epilogue"]


def test_launches_are_about_as_many_as_on_the_fake_device() -> None:
    """It records 19 kernels of ours and 153 torch operators that run on the device."""
    counts = counts_of("step + clip", A) or []
    assert sum(count.launches for count in counts) == pytest.approx(153 + 19, rel=0.1)


def test_instructions_are_those_of_the_compile_report() -> None:
    report = json.loads((ROOT / "benchmarks/results/kernels-sm90-compile.json").read_text())
    rows = {row["name"]: row for row in report["kernels"]}
    for k, instructions in SELECT_INSTRUCTIONS.items():
        assert rows[f"select k={k}"]["instructions"]["all"] == instructions
    for columns, instructions in SPLIT_INSTRUCTIONS.items():
        row = rows[f"split bf16 D={768 if columns == 1024 else columns}"]
        assert row["instructions"]["all"] == instructions
    wide = rows["filter bf16 128x256x64 8w 4s descriptors inline"]
    assert wide["slots_per_miss"] == SLOTS_PER_MISS


def test_the_tables_of_the_note_are_those_of_the_counts() -> None:
    note = (ROOT / "benchmarks/notes/kernels.md").read_text()
    for line in (*summary_table(), *parts_table(Options(clip=True))):
        assert line in note
    for line in parts_table(Options(float8=True)):
        assert line in note


def test_predicted_ratios_lie_between_the_best_case_and_the_audit() -> None:
    """Before, predicted: 2.2 at A, 1.5 at B, 1.7 at C."""
    for work, before in ((A, 2.2), (B, 1.5), (C, 1.7)):
        expected = step_ratio(work, OPTIONS["step + clip"], EXPECTED)
        assert step_ratio(work, OPTIONS["step + clip"], BEST) < expected < before
    assert (auxk_share(A), auxk_share(B), auxk_share(C)) == (1, 1 / 4, 1 / 8)


def test_steps_are_sums_of_their_kernels() -> None:
    step = counts_of("step", A) or []
    for op in ("encode + topk", "decode + error + dots"):
        for count in counts_of(op, A) or []:
            assert count in step
    sort, update = counts_of("row update", A) or []
    assert sort in step
    # The benchmark of the kernel alone has x in float32.
    assert update.n_bytes - part(A, "update").n_bytes == 2 * 2**20 * 768


def test_every_step_of_the_table_is_predicted_and_planned() -> None:
    assert set(OPTIONS) == {variant.op for variant in (*VARIANTS, FLOAT8_VARIANT)}
    assert predict("row gradients", A, H200) is None and planned("gemm", A, H200) is None
    for op in OPTIONS:
        for work in (A, B, C):
            plan = planned(op, work, H200)
            assert plan is not None and predicted(op, work) > predicted("gemm", work)
            state = 2 * work.L * work.D * (4 + 2 * OPTIONS[op].moment_bytes + 2)
            assert state < plan.peak_bytes < 1.7 * state + 16e9
    with_auxk, plain = (planned(op, A, H200) for op in ("step + clip + auxk", "step + clip"))
    assert with_auxk is not None and plain is not None
    assert with_auxk.step_s > 1.5 * plain.step_s and with_auxk.peak_bytes > plain.peak_bytes


def measured(op: str, seconds: float | None, **more: Any) -> Row:
    row = {"shape": "A", "op": op, "work": {**vars(A), "dtype": "bfloat16"}, **more}
    return row if seconds is None else {**row, "median_s": seconds, "ratio": 2.0}


def outcomes(name: str, *rows: Row) -> list[Outcome]:
    device = Outcome("device", "", rows=[{"op": "device", "name": name}])
    return [device, Outcome("step", "", rows=list(rows))]


def test_the_table_has_prediction_plan_and_measurement_of_each_row() -> None:
    seconds = 2 * predicted("step + clip")
    rows = (
        measured("step + clip", seconds, peak_bytes=5 << 30),
        measured("row gradients", 1.0),
        measured("step", None, error="budget"),
    )
    found = outcomes("NVIDIA H200", *rows)
    step, kernel, failed = comparison(found, interpreted=False)
    assert step["off"] == pytest.approx(2) and step["peak_bytes"] == 5 << 30
    assert step["plan_s"] > 0 and step["plan_bytes"] > 1 << 30
    assert "predicted_s" not in kernel and kernel["measured_s"] == 1.0
    assert failed["predicted_s"] > 0 and failed["error"] == "budget" and "off" not in failed
    assert device_of(found, interpreted=False) == "H200"
    text = format_table([step, kernel, failed], COLUMNS)
    assert "predicted ms" in text and "plan MiB" in text


def test_an_unknown_device_has_measurements_only() -> None:
    found = outcomes("NVIDIA B300", measured("step", 0.5))
    (row,) = comparison(found, interpreted=False)
    assert row["measured_s"] == 0.5 and "predicted_s" not in row
    assert device_of(found, interpreted=False) == "?"
    (row,) = comparison(found, interpreted=True)
    assert row["predicted_s"] == predicted("step")
