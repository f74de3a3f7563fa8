"""Test that kernel cases run with and without pytest, in shares, and after a crash."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu.cases.log import LOST, CaseLog, device_is_lost, share_of
from benchmarks.gpu.cases.runner import cases_of, run_cases, stand_in
from benchmarks.gpu.cases.worker import case_files
from tests.support.paths import ROOT

CASES = """
import pytest
from collections import OrderedDict

pytestmark = pytest.mark.gpu

@pytest.mark.parametrize("a", [1, 2], ids=str)
@pytest.mark.parametrize(("b", "c"), [(3, 4), (5, 6)])
def test_product(a, b, c):
    assert (a, b, c) != (2, 5, 6), "two, five and six"

@pytest.mark.skipif(True, reason="never here")
def test_skipped():
    raise AssertionError

@pytest.mark.skipif(False, reason="always here")
def test_patched(monkeypatch):
    import json, os
    monkeypatch.setattr("json.dumps", len)
    monkeypatch.setattr(os, "sep", "|")
    assert json.dumps("abc") == 3 and os.sep == "|"

def test_restored():
    import json, os
    assert json.dumps("abc") == '"abc"' and os.sep == "/"

def test_raises():
    with pytest.raises(ValueError, match="b.d"):
        raise ValueError("a bad value")

def test_raises_nothing():
    with pytest.raises(ValueError):
        pass

def test_raises_another_text():
    with pytest.raises(ValueError, match="good"):
        raise ValueError("a bad value")

def test_unknown_fixture(tmp_path):
    pass
"""


def write_cases(folder: Path, text: str = CASES) -> Path:
    folder = folder / "some" / "gpu"
    folder.mkdir(parents=True)
    (folder / "test_some.py").write_text(text)
    return folder


def logged(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def outcomes(path: Path) -> dict[str, str]:
    return {line["case"]: line["outcome"] for line in logged(path) if "case" in line}


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep pytest and the search path as they are after `run_cases` has replaced them."""
    monkeypatch.setitem(sys.modules, "pytest", pytest)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("some.gpu.test_some", "some.gpu", "some"):
        monkeypatch.delitem(sys.modules, name, raising=False)


def test_cases_run_without_pytest(tmp_path: Path, alone: None) -> None:
    log = tmp_path / "log.jsonl"
    assert run_cases(write_cases(tmp_path), CaseLog(log), "0/1", 1) == 0
    name = "some/gpu/test_some.py::test_"
    assert outcomes(log) == {
        f"{name}product[0]": "passed",
        f"{name}product[1]": "passed",
        f"{name}product[2]": "passed",
        f"{name}product[3]": "failed",
        f"{name}skipped": "skipped",
        f"{name}patched": "passed",
        f"{name}restored": "passed",
        f"{name}raises": "passed",
        f"{name}raises_nothing": "failed",
        f"{name}raises_another_text": "failed",
        f"{name}unknown_fixture": "failed",
    }
    texts = {line["case"]: line["text"] for line in logged(log) if "text" in line}
    assert "two, five and six" in texts[f"{name}product[3]"]
    assert texts[f"{name}skipped"] == "never here"
    assert "fixtures ['tmp_path'] are not supported" in texts[f"{name}unknown_fixture"]
    assert logged(log)[0] == {"selected": 11, "runner": "without pytest"}


def test_a_module_with_a_missing_package_is_skipped_and_a_broken_one_fails(
    tmp_path: Path, alone: None
) -> None:
    folder = write_cases(tmp_path, "import no_such_package\n")
    (folder / "test_wrong.py").write_text("1 / 0\n")
    log = tmp_path / "log.jsonl"
    run_cases(folder, CaseLog(log), "0/2", 1)
    assert outcomes(log) == {"some/gpu/test_some.py": "skipped", "some/gpu/test_wrong.py": "failed"}
    run_cases(folder, CaseLog(tmp_path / "other.jsonl"), "1/2", 1)
    assert outcomes(tmp_path / "other.jsonl") == {}


def test_a_lost_device_ends_the_process_and_the_next_one_goes_on(
    tmp_path: Path, alone: None
) -> None:
    text = "def test_a(): raise RuntimeError('CUDA error: an illegal access')\ndef test_b(): pass\n"
    folder = write_cases(tmp_path, text)
    log = tmp_path / "log.jsonl"
    assert run_cases(folder, CaseLog(log), "0/1", 1) == LOST
    assert list(outcomes(log).values()) == ["failed"]
    assert run_cases(folder, CaseLog(log), "0/1", 1) == 0
    assert list(outcomes(log).values()) == ["failed", "passed"]
    assert sum("selected" in line for line in logged(log)) == 1


def test_out_of_memory_does_not_lose_the_device() -> None:
    assert device_is_lost("AcceleratorError: CUDA error: misaligned address")
    assert not device_is_lost("CUDA error: out of memory") and not device_is_lost("AssertionError")


def test_cases_are_those_of_a_gpu_not_of_the_fake_device() -> None:
    files = [Path(path) for path in case_files()]
    assert {path.parent for path in files} == {ROOT / "tests" / "gpu"}
    assert "test_triton_encode.py" in {path.name for path in files}


def test_shares_cover_the_cases_once() -> None:
    cases = [str(i) for i in range(11)]
    shares = [share_of(cases, f"{i}/3", 1) for i in range(3)]
    assert sorted((case for share in shares for case in share), key=int) == cases
    assert share_of(cases, "0/2", 4) + share_of(cases, "1/2", 4) == ["0", "8", "4"]


@pytest.mark.slow
def test_the_stand_in_finds_as_many_cases_as_pytest() -> None:
    pytest.importorskip("triton", reason="triton is not installed: pip install triton")
    code = """
import sys
from benchmarks.gpu.cases import runner
from importlib import import_module
sys.modules["pytest"] = runner.stand_in()
names = ["encode", "float8", "update"]
modules = [import_module(f"tests.gpu.test_triton_{name}") for name in names]
print(sum(len(list(runner.cases_of(module, ""))) for module in modules))
"""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}

    def run(*arguments: str) -> str:
        command = [sys.executable, *arguments]
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True
        )
        return done.stdout

    files = [f"tests/gpu/test_triton_{name}.py" for name in ("encode", "float8", "update")]
    listed = run("-m", "pytest", "--collect-only", "-q", *files)
    assert int(run("-c", code)) == sum("::" in line for line in listed.splitlines()) > 80


@pytest.mark.slow
@pytest.mark.parametrize("extra", [[], ["--no-pytest"]])
def test_a_worker_logs_its_share(tmp_path: Path, extra: list[str]) -> None:
    pytest.importorskip("triton", reason="triton is not installed: pip install triton")
    log = tmp_path / "log.jsonl"
    command = [sys.executable, "-m", "benchmarks.gpu.cases.worker", "--share", "0/2", *extra]
    done = subprocess.run(
        [*command, "--stride", "1000", "--log", str(log)],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert list(outcomes(log).values()) == ["passed"]
    (first, *_) = logged(log)
    assert first["selected"] == 1 and first["runner"] == ("without pytest" if extra else "pytest")


def test_the_stand_in_knows_marks_without_arguments() -> None:
    mark = stand_in().mark

    @mark.slow
    @mark.parametrize("a", [1])
    def test_one(a: int) -> None:
        """One case."""

    module: Any = type(sys)("some_module")
    module.test_one, test_one.__module__ = test_one, "some_module"
    (case,) = cases_of(module, "file")
    assert (case.name, case.arguments, case.skip) == ("file::test_one[0]", {"a": 1}, "")
