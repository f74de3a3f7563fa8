"""Test the step benchmark: its rows, its behaviour without GPU or peers, its baselines."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.harness.errors import BenchmarkError
from benchmarks.harness.timing import interleaved
from benchmarks.step import measure as step_measure
from benchmarks.step import yardstick
from benchmarks.step.__main__ import DEFAULTS, plan
from benchmarks.step.baselines import Autoencoder, dense_gradients, sparse_gradients
from benchmarks.step.measure import Budget, Row, measure, slope_row, work_cases, yardstick_cases
from benchmarks.step.work import Case, Inputs, Setup, Work
from benchmarks.step.yardstick import encoder_gemms
from tests.support.paths import ROOT

WORK = Work(L=512, D=32, B=64, k=4)
CPU = Setup.of("cpu")
STEPS = (
    "step",
    "step + clip",
    "step + clip + auxk",
    "step + clip + auxk on 1/8 rows",
    "step, bfloat16 moments",
)


def run_python(
    code: str, *arguments: str, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT,
        env={**os.environ, **(environment or {})},
        capture_output=True,
        text=True,
        check=False,
    )


# --- the whole command


def test_the_command_needs_only_torch_and_numpy(tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    absent = ["deepspeed", "ray", "zarr", "hydra", "omegaconf", "transformers", "safetensors"]
    code = f"""
import runpy, sys
for name in {absent}:
    sys.modules[name] = None
runpy.run_module("benchmarks.step", run_name="__main__", alter_sys=True)
"""
    arguments = ["--work", "512,32,64,4", "--slope", "128,256,512", "--slope-work", "32,64,4"]
    arguments += ["--rounds", "2", "--no-peers", "--json", str(out)]
    done = run_python(code, *arguments)
    assert done.returncode == 0, done.stderr
    document = json.loads(out.read_text())
    assert {"hardware", "versions", "commit", "command"} <= set(document)
    rows = document["rows"]
    assert not [row for row in rows if "error" in row]
    head, tail = rows[:-7], rows[-7:]
    assert [(row["system"], row["op"]) for row in head] == [
        ("torch", "gemm"),
        ("torch", "linear"),
        ("ours", "encode + topk"),
        ("ours", "encode + topk, no prefilter"),
        ("ours", "decode + error + dots"),
        ("ours", "row gradients"),
        ("ours", "row update"),
        *(("ours", op) for op in STEPS),
        ("baseline", "dense autograd"),
        ("baseline", "sparse gather"),
    ]
    for row in head:
        assert row["work"] == {"L": 512, "D": 32, "B": 64, "k": 4, "dtype": "float32"}
        assert row["ratio"] == pytest.approx(row["median_s"] / row["gemm_s"])
        assert row["tokens_per_s"] == pytest.approx(64 / row["median_s"])
        assert (row["mfu"], row["rounds"]) == (None, 2)
    assert {row["op"]: row["engine"] for row in rows if "engine" in row} == {
        **dict.fromkeys(STEPS, "none"),
        "slope": "none",
    }
    # `auto` does not time so small a product.
    encoders = ("encode + topk", "encode + topk, no prefilter", *STEPS)
    found = {row["op"]: row["prefilter"] for row in rows if "prefilter" in row}
    assert found == dict.fromkeys(encoders, "none")
    assert [row["op"] for row in tail] == ["gemm", "step + clip"] * 3 + ["slope"]
    assert tail[-1]["work"]["L"] == [128, 256, 512]
    assert math.isfinite(tail[-1]["slope"])
    assert all(op in done.stdout for op in STEPS)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_device_cuda_without_a_gpu_is_a_one_line_error() -> None:
    command = [sys.executable, "-m", "benchmarks.step", "--device", "cuda"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1
    assert "--device cpu" in done.stderr


@pytest.mark.slow
def test_a_step_without_deepspeed_equals_the_engines_step() -> None:
    code = """
import torch
from benchmarks.step import ours as step_ours
from benchmarks.harness.one_rank import start_one_rank
from benchmarks.step.work import Inputs, Setup, Work
from sae_core.engine.deepspeed_engine import SAEEngine
from sae_core.kernels import get_kernels

start_one_rank()
inputs = Inputs(Work(256, 32, 64, 4), Setup.of("cpu"))
config = step_ours.trainer_config(inputs, step_ours.Variant("", clip=True, auxk_rows=0.5))
saes = []
for plain in (True, False):
    torch.manual_seed(0)
    sae = step_ours.fresh_sae(config.sae, 32, get_kernels("stock", torch.float32), CPU)
    sae.tokens_since_fired[::3] = config.sae.dead_after_tokens
    trainer = (
        step_ours.PlainTrainer(sae, config) if plain else SAEEngine("sae", sae, config, CPU)
    )
    torch.manual_seed(1)
    for i in range(3):
        trainer.train_step(torch.randn(64, 32), i)
    saes.append(sae.state_dict())
for name, tensor in saes[0].items():
    assert torch.equal(tensor, saes[1][name]), name
assert saes[0]["W_dec"].norm(dim=1).sub(1).abs().max() < 1e-5
assert 0 < (saes[0]["tokens_since_fired"] == 0).sum() < 256
""".replace("CPU", 'torch.device("cpu")')
    done = run_python(code)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_gpu_cases_run_on_triton_kernels() -> None:
    pytest.importorskip("triton", reason="triton is not installed: pip install triton")
    code = """
import torch
from benchmarks.step import ours as step_ours
from benchmarks.harness.one_rank import start_one_rank
from benchmarks.step.work import Inputs, Setup, Work

start_one_rank()
step_ours.engine_name = lambda: "none"
# The interpreter takes CPU tensors, and float16 instead of bfloat16.
inputs = Inputs(Work(128, 16, 8, 2), Setup(torch.device("cpu"), "triton", torch.float16))
cases = {case.op: case for case in step_ours.our_cases(inputs)}
encode = step_ours._encode_case
cases["tf32"] = encode(inputs, "tf32", tf32=True)
cases["float8"] = encode(inputs, "float8", "float8")
for op in ("encode + topk", "tf32", "float8", "decode + error + dots", "row update",
           "step + clip + auxk on 1/8 rows"):
    cases[op].make()()
"""
    done = run_python(code, environment={"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 0, done.stderr[-4000:]


# --- options


def options(**named: Any) -> Any:
    values = {"device": "cpu", "rounds": 3, "budget_s": None, "work": None, "slope": None}
    return type("Options", (), {**values, "slope_work": None, **named})


def test_plan_follows_the_options() -> None:
    assert plan(options()) == ([Work.parse(DEFAULTS["cpu"].works[0])], [])
    assert plan(options(work=["8,4,2,1"])) == ([Work(8, 4, 2, 1)], [])
    slope = [Work(16, 4, 2, 1), Work(8, 4, 2, 1)]
    assert plan(options(slope="16,8", slope_work="4,2,1")) == ([], slope)


def test_a_gpu_gets_the_cases_it_supports(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    works, slope = plan(options(device="cuda"))
    assert [Work.parse(text) for text in DEFAULTS["cuda"].works] == works
    assert [work.L for work in slope] == [131072, 262144, 524288]
    inputs = Inputs(works[-1], Setup.of("cuda"))
    wanted = {"encode + topk, float8 prefilter", "step, float8 prefilter"}
    for capability in ((8, 0), (9, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda c=capability: c)
        ops = {case.op: case for case in work_cases(inputs)}
        assert wanted & set(ops) == (wanted if capability >= (9, 0) else set())
        assert {"encode + topk, tf32", "row update", *STEPS} <= set(ops)
    # The largest work must fit one GPU of 139 GiB, except for the dense baseline's [B, L].
    room = (139 << 30) - inputs.needs_bytes
    assert all(case.needs_bytes < room for case in ops.values() if case.system == "ours")
    assert ops["dense autograd"].needs_bytes > room


@pytest.mark.parametrize(
    ("named", "words"),
    [
        ({"work": ["8,4,2"]}, "expected L,D,B,k"),
        ({"work": ["8,4,0,1"]}, "at least 1"),
        ({"work": ["8,4,2,x"]}, "whole numbers"),
        ({"work": ["8,4,2,9"]}, "at most L=8"),
        ({"slope": "64,64"}, "two different L"),
        ({"slope": "64,"}, "expected L1,L2,L3"),
        ({"slope": "64,128", "slope_work": "4,2"}, "expected D,B,k"),
        ({"rounds": 0}, "expected at least 1"),
        ({"budget_s": 0.0}, "more than 0"),
    ],
)
def test_invalid_options_are_refused(named: dict[str, Any], words: str) -> None:
    with pytest.raises(BenchmarkError, match=words):
        plan(options(**named))


# --- measuring


def fake(op: str, call: Callable[[], object], needs_bytes: int = 0) -> Case:
    return Case("ours", op, lambda: call, needs_bytes)


def measured(cases: list[Case], rounds: int = 2, **budgets: Budget) -> dict[str, Row]:
    rows = measure(
        WORK,
        CPU,
        lambda inputs: [*yardstick_cases(inputs)[:1], *cases],
        rounds=rounds,
        **{"budget": Budget(), "share": Budget(), **budgets},
    )
    assert [row["op"] for row in rows] == ["gemm", *(case.op for case in cases)]
    return {row["op"]: row for row in rows}


def test_a_failing_case_loses_only_its_own_row() -> None:
    def fail() -> None:
        raise RuntimeError("no such\n  instruction")

    rows = measured([fake("bad", fail), fake("good", lambda: None)])
    assert rows["bad"]["error"] == "RuntimeError: no such instruction"
    assert "median_s" not in rows["bad"]
    assert rows["good"]["ratio"] == rows["good"]["median_s"] / rows["gemm"]["median_s"]


def test_a_case_that_fails_while_timed_leaves_rows_with_errors() -> None:
    calls: list[int] = []

    def fail_later() -> None:
        calls.append(1)
        if len(calls) > 3:
            raise RuntimeError("worn out")

    rows = measured([fake("tired", fail_later)])
    assert rows["tired"]["error"] == rows["gemm"]["error"] == "RuntimeError: worn out"


def test_a_case_that_cannot_fit_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_measure, "free_bytes", lambda device: 4 << 30)
    rows = measured([fake("huge", lambda: pytest.fail("tried"), 1 << 40), fake("small", int)])
    assert rows["huge"]["error"] == "needs 1024.0 GiB, 4.0 GiB are free"
    assert "median_s" in rows["small"]


def test_cases_share_a_block_while_memory_lasts(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks: list[list[str]] = []

    def spy(calls: dict[str, Any], **rest: Any) -> Any:
        blocks.append(list(calls))
        return interleaved(calls, **rest)

    monkeypatch.setattr(step_measure, "interleaved", spy)
    monkeypatch.setattr(step_measure, "free_bytes", lambda device: 10 << 30)
    rows = measured([fake("a", int, 2 << 30), fake("b", int, 3 << 30), fake("c", int, 8 << 30)])
    assert blocks == [["gemm", "a", "b"], ["gemm", "c"]]
    assert rows["c"]["gemm_s"] != rows["gemm"]["gemm_s"] == rows["a"]["gemm_s"]


def test_rounds_are_cut_to_the_share() -> None:
    share = Budget(time.monotonic() + 1.0)
    rows = measured([fake("nap", lambda: time.sleep(0.1))], rounds=1000, share=share)
    assert 1 <= rows["nap"]["rounds"] <= 10
    assert rows["gemm"]["rounds"] == rows["nap"]["rounds"]
    spent = Budget(time.monotonic())
    assert measured([fake("nap", int)], rounds=9, share=spent)["nap"]["rounds"] == 1


def test_rows_without_time_name_the_budget() -> None:
    rows = measured([fake("a", lambda: pytest.fail("begun"))], budget=Budget(time.monotonic()))
    assert rows["a"]["error"] == rows["gemm"]["error"] == "budget"
    soon = Budget(time.monotonic() + 0.5)  # enough for a trial call, not for a round
    rows = measured([fake("slow", lambda: time.sleep(0.2))], budget=soon)
    assert rows["slow"]["error"] == "budget"


def test_shares_divide_the_remaining_time() -> None:
    budget = Budget(time.monotonic() + 100.0)
    assert budget.share(4).left_s() == pytest.approx(25.0, abs=1.0)
    assert Budget().share(4).left_s() == math.inf


# --- the slope


def slope_rows(seconds: Callable[[int], float]) -> list[Row]:
    gemm = {"system": "torch", "op": "gemm", "work": {"L": 1}, "median_s": 1.0, "gemm_s": 1.0}
    step = {"system": "ours", "op": "step + clip", "engine": "none"}
    rows = [gemm]
    for L in (128, 256, 1024):
        work = {"L": L, "D": 8, "B": 4, "k": 2, "dtype": "float32"}
        rows.append({**step, "work": work, "median_s": seconds(L), "gemm_s": L * 1e-6})
    return rows


def test_slope_is_the_exponent_of_L() -> None:
    row = slope_row(slope_rows(lambda L: 3e-6 * L**1.25))
    assert row["slope"] == pytest.approx(1.25)
    assert row["gemm_slope"] == pytest.approx(1.0)
    assert (row["op"], row["system"], row["engine"]) == ("slope", "ours", "none")
    assert row["work"] == {"L": [128, 256, 1024], "D": 8, "B": 4, "k": 2, "dtype": "float32"}


def test_slope_needs_every_size() -> None:
    rows = slope_rows(float)
    rows[2] = {key: rows[2][key] for key in ("system", "op", "work")} | {"error": "budget"}
    row = slope_row(rows)
    assert "not both measured at every L" in row["error"]
    assert "slope" not in row


# --- baselines and yardstick


def test_both_baselines_have_the_same_gradients() -> None:
    torch.manual_seed(0)
    inputs = Inputs(Work(L=256, D=16, B=32, k=4), CPU)
    gradients = []
    for body in (dense_gradients, sparse_gradients):
        torch.manual_seed(1)
        model = Autoencoder(inputs)
        with torch.no_grad():
            model.b_enc.normal_()
            model.b_dec.normal_()
        body(model, inputs)
        gradients.append([parameter.grad for parameter in model.parameters])
    for dense, sparse in zip(*gradients, strict=True):
        assert dense is not None
        torch.testing.assert_close(dense, sparse, rtol=1e-4, atol=1e-7)
    model.update()
    torch.testing.assert_close(model.W_dec.norm(dim=1), torch.ones(256))
    assert model.W_enc.grad is None


def test_yardstick_in_pieces_covers_every_row(monkeypatch: pytest.MonkeyPatch) -> None:
    pieces: list[int] = []

    def linear(x: torch.Tensor, *_: torch.Tensor) -> None:
        pieces.append(len(x))

    monkeypatch.setattr(yardstick, "_PIECE_ELEMENTS", 3 * 16 + 5)
    monkeypatch.setattr(torch.nn.functional, "linear", linear)
    calls = encoder_gemms(torch.randn(8, 4), torch.randn(16, 4), torch.zeros(16))
    calls["linear"]()
    calls["gemm"]()
    assert pieces == [3, 3, 2]
