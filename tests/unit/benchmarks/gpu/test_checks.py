"""Test that the checks of `benchmarks.gpu` find what they look for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks.gpu.checks import many_elements, sanitizer
from benchmarks.gpu.checks.resume import differences
from benchmarks.gpu.part import Context
from benchmarks.gpu.shapes import INTERPRETED
from benchmarks.gpu.timing.waits import device_times, sync_warnings
from benchmarks.step.measure import Budget
from benchmarks.step.work import Setup
from benchmarks.step.yardstick import encoder_gemms
from tests.support.paths import ROOT

CPU = Setup(torch.device("cpu"), "triton", torch.float16)


@pytest.fixture
def context(tmp_path: Path) -> Context:
    return Context(CPU, INTERPRETED, Budget(), True, tmp_path / "result.json")


def test_rows_are_in_the_file_as_soon_as_they_are_reported(context: Context) -> None:
    context.report("first", value=1)
    assert json.loads(context._result.read_text()) == {"rows": [{"op": "first", "value": 1}]}
    context.save(summary="done")
    assert json.loads(context._result.read_text())["summary"] == "done"


def test_products_of_many_elements_pass_unless_an_element_is_wrong(
    context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    many_elements.run(context)
    assert [row["passed"] for row in context.rows] == [True, True]
    linear = torch.nn.functional.linear

    def wrong_at_the_end(x: torch.Tensor, W: torch.Tensor) -> torch.Tensor:
        out = linear(x, W)
        out[-1, -1] += 0.1
        return out

    monkeypatch.setattr("benchmarks.gpu.checks.many_elements.F.linear", wrong_at_the_end)
    many_elements.run(context)
    assert [row["passed"] for row in context.rows[2:]] == [True, False]


def test_products_of_many_elements_are_skipped_where_memory_is_short(
    context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(many_elements, "free_bytes", lambda device: 1000)
    assert "skipped, needs" in many_elements.run(context)
    assert ["passed" in row for row in context.rows] == [False, False]


def test_samples_include_both_ends_and_the_limit_of_32_bits() -> None:
    device = torch.device("cpu")
    places = set(many_elements._places(2**32, device).tolist())
    assert {0, 2**31 - 1, 2**31, 2**31 + 1, 2**32 - 1} <= places
    assert max(many_elements._places(100, device).tolist()) == 99


def test_differences_compare_bits() -> None:
    one = {"a": torch.tensor([[0.0, 1.0], [float("nan"), 2.0]]), "b": torch.tensor(3)}
    same = {name: tensor.clone() for name, tensor in one.items()}
    assert differences(one, same) == {}  # NaN equals NaN
    same["a"][0] = torch.tensor([-0.0, 5.0])
    same["b"] += 1
    assert differences(one, same) == {"a": 2, "b": 1}


def test_waits_are_counted_by_place() -> None:
    modes: list[str] = []

    def step() -> None:
        for _ in range(2):
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("something else", stacklevel=1)

    places = sync_warnings(step, modes.append)
    assert modes == ["warn", "default"]
    ((place, count),) = places.items()
    assert place.startswith(__file__) and count == 2


def test_device_time_counts_kernels_only() -> None:
    def event(key: str, device: str, microseconds: float) -> SimpleNamespace:
        kind = SimpleNamespace(name=device)
        return SimpleNamespace(
            key=key,
            device_type=kind,
            count=3,
            self_device_time_total=microseconds,
            self_cpu_time_total=1.0,
        )

    events = [event("aten::mm", "CPU", 50.0), event("k1", "CUDA", 20.0), event("k2", "CUDA", 50.0)]
    assert device_times(events, on_cuda=True) == [("k2", 5e-5, 3), ("k1", 2e-5, 3)]
    assert len(device_times(events, on_cuda=False)) == 3


@pytest.mark.parametrize(
    ("output", "errors"),
    [
        ("========= ERROR SUMMARY: 3 errors", 3),
        ("========= RACECHECK SUMMARY: 2 hazards displayed (1 error, 1 warning)", 2),
        ("nothing", 0),
    ],
)
def test_errors_of_the_sanitizer_are_counted(output: str, errors: int) -> None:
    assert sanitizer._errors(output) == errors


def test_the_yardstick_of_the_interpreter_is_float16() -> None:
    x, W, b = (torch.ones(*shape, dtype=torch.float16) for shape in ((3, 4), (5, 4), (5,)))
    for product in encoder_gemms(x, W, b).values():
        product()


CHANGED = """
import torch, sys
from pathlib import Path
from benchmarks.gpu import child
from benchmarks.gpu.checks import {module}
{change}
part = "benchmarks.gpu.checks.{module}:run"
sys.exit(child.run_part(part, Path(sys.argv[1]), 3000, {rank}, True))
"""
CHANGES = {
    "bits": (
        "exact_encoder",
        """
from benchmarks.gpu.encoders import encode
whole = encode.Encoder.topk
def changed(self, *inputs):
    values, latents = whole(self, *inputs)
    if self.tiles.few.tile.BN == 32:
        values[0, 0] += 2**-10
    return values, latents
encode.Encoder.topk = changed
""",
        "equal bits",
    ),
    "a candidate": (
        "exact_encoder",
        """
from benchmarks.gpu.encoders import encode
whole = encode.Encoder.topk
def changed(self, *inputs):
    if self.tiles.few.tile.BN == 32:
        raise RuntimeError("does not compile")
    return whole(self, *inputs)
encode.Encoder.topk = changed
""",
        "candidate runs",
    ),
    "selection": (
        "exact_encoder",
        """
from benchmarks.gpu.encoders import encode
whole = encode.Encoder.topk
def changed(self, x, W, b, k):
    values, latents = whole(self, x, W, b, k + 1)
    return values[:, 1:], latents[:, 1:]
encode.Encoder.topk = changed
""",
        "selection against float64",
    ),
    "bound": (
        "float8",
        """
whole = float8.TritonKernels.bounded_topk
def changed(self, *inputs):
    values, latents = whole(self, *inputs)
    return values * 1.5 + 1, latents
float8.TritonKernels.bounded_topk = changed
""",
        "float8 error",
    ),
    "seeds": (
        "resume",
        """
train = resume.PlainTrainer.train_step
def changed(self, raw, step):
    train(self, raw + 1e-3 * torch.rand(()), step)  # other noise in each run
resume.PlainTrainer.train_step = changed
resume.find_spec = lambda name: None
resume.VARIANTS = resume.VARIANTS[:1]
resume.torch.manual_seed = lambda seed: None
""",
        "equal seeds, save and resume",
    ),
    "moments": (
        "resume",
        """
resume.find_spec = lambda name: None
resume.VARIANTS = resume.VARIANTS[:1]
load = torch.load
def changed(*arguments, **named):
    content = load(*arguments, **named)
    content["moments"]["W_enc"]["exp_avg"].zero_()
    return content
torch.load = changed
""",
        "save and resume",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("what", CHANGES)
def test_a_defect_fails_its_check(what: str, tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="triton is not installed: pip install triton")
    module, change, op = CHANGES[what]
    code = CHANGED.format(module=module, change=change, rank=module == "resume")
    out = tmp_path / "result.json"
    done = subprocess.run(
        [sys.executable, "-c", code, str(out)],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr + out.read_text()
    rows = json.loads(out.read_text())["rows"]
    failed = sorted({row["op"] for row in rows if row.get("passed") is False})
    assert ", ".join(failed) == op, rows


def test_steps_can_be_captured_without_deepspeed() -> None:
    code = """
import sys
sys.modules["deepspeed"] = None  # importing it raises ImportError
from benchmarks.gpu.checks import graph
from benchmarks.step.ours import engine_name
assert engine_name() == "none" and graph.StepGraph.__module__ == "sae_core.engine.step_graph"
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
