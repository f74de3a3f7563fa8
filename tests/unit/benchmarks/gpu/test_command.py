"""Test `python -m benchmarks.gpu` as a whole, at tiny sizes in Triton's interpreter."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu.parts import PARTS
from tests.support.paths import ROOT

pytest.importorskip("triton", reason="triton is not installed: pip install triton")

ABSENT = (
    *("crc32c", "deepspeed", "hydra", "ml_dtypes", "numcodecs", "obstore", "omegaconf", "pyarrow"),
    *("pytest", "ray", "rich", "safetensors", "scipy", "transformers", "wandb", "yaml", "zarr"),
)
"""Packages that a GPU machine may lack."""
HIDE = f"""
import sys
from importlib.machinery import PathFinder

class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.partition(".")[0] in {ABSENT!r}:
            return None
        return super().find_spec(name, path, target)

sys.meta_path = [Without if finder is PathFinder else finder for finder in sys.meta_path]
"""


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "benchmarks.gpu", *arguments]


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", **more}


def run(*arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments),
        cwd=ROOT,
        env=environment(**more),
        capture_output=True,
        text=True,
        check=False,
    )


def hide_packages(folder: Path) -> str:
    """Return a folder for PYTHONPATH in which all Python processes lack the packages `ABSENT`."""
    (folder / "sitecustomize.py").write_text(HIDE)
    return os.pathsep.join((str(folder), str(ROOT)))


def parts_of(path: Path) -> dict[str, dict[str, Any]]:
    document = json.loads(path.read_text())
    assert {"hardware", "versions", "commit", "command", "changes", "rows"} <= set(document)
    return {part["part"]: part for part in document["parts"]}


# --- the whole command


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_every_part_runs_with_only_torch_triton_and_numpy(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    hidden = {"PYTHONPATH": hide_packages(tmp_path)}
    code = f"from importlib.util import find_spec\nprint(list(filter(find_spec, {ABSENT!r})))"
    check = [sys.executable, "-c", code]
    assert subprocess.check_output(check, env=environment(**hidden), text=True) == "[]\n"
    done = run("--interpret", "--minutes", "45", "--json", str(out), **hidden)
    assert done.returncode == 0, done.stdout + done.stderr
    parts = parts_of(out)
    assert list(parts) == [part.name for part in PARTS]
    assert {name: part["status"] for name, part in parts.items()} == dict.fromkeys(parts, "ok")
    assert "without pytest" in parts["cases"]["summary"]
    assert parts["cases"]["rows"][0]["n_passed"] >= 3
    assert "9 of 9 comparisons equal bit for bit (optimiser alone" in parts["resume"]["summary"]
    skipped = [row["op"] for part in parts.values() for row in part["rows"] if "skipped" in row]
    assert sorted(set(skipped)) == ["compute-sanitizer", "graph", "host waits"]
    ops = {row["op"] for row in json.loads(out.read_text())["rows"]}
    assert {"gemm", "step + clip", "encode + topk", "row update"} <= ops
    for part in PARTS:
        assert f"\n{part.name} " in f"\n{done.stdout}"
    assert "predicted and measured for H200" in done.stdout
    assert "to change: nothing found" in done.stdout


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_sigterm_leaves_a_valid_file_with_what_was_found(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    process = subprocess.Popen(
        command("--interpret", "--json", str(out), "--parts", "many", "resume"),
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    until = time.monotonic() + 600
    while time.monotonic() < until:
        time.sleep(0.2)
        # The file is complete whenever it is there: it is replaced, never written in place.
        if out.exists() and parts_of(out).get("resume", {}).get("rows"):
            break
    process.send_signal(signal.SIGTERM)
    printed, errors = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM, errors
    parts = parts_of(out)
    assert parts["many"]["status"] == "ok"
    assert parts["resume"]["status"] == "stopped" and parts["resume"]["rows"]
    assert "stopped" in printed and "stopped by signal 15" in errors


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_resume_uses_deepspeed_and_checkpoints_where_installed(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    out = tmp_path / "gpu.json"
    done = run("--interpret", "--parts", "resume", "--json", str(out))
    part = parts_of(out)["resume"]
    paths = {row["path"] for row in part["rows"] if "path" in row}
    assert paths == {"deepspeed, checkpoint"}, part
    assert {row["op"] for row in part["rows"]} == {
        "equal seeds",
        "save and resume",
        "training moves the weights",
    }
    assert (done.returncode, part["status"]) == (0, "ok"), part


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_sanitizer_runs_a_small_step(tmp_path: Path) -> None:
    tool = tmp_path / "compute-sanitizer"
    # Runs the command behind its options, then reports no error, or two races.
    tool.write_text(
        "#!/bin/sh\n"
        'tool=$2; shift 6; "$@" || exit 1\n'
        "if [ $tool = racecheck ]; then\n"
        "  echo '========= RACECHECK SUMMARY: 2 hazards displayed'; exit 99\n"
        "fi\n"
        "echo '========= ERROR SUMMARY: 0 errors'\n"
    )
    tool.chmod(0o755)
    out = tmp_path / "gpu.json"
    path = os.pathsep.join((str(tmp_path), os.environ["PATH"]))
    done = run("--interpret", "--parts", "sanitizer", "--json", str(out), PATH=path)
    memory, races = parts_of(out)["sanitizer"]["rows"]
    assert (memory["op"], memory["errors"], memory["passed"]) == ("memcheck", 0, True), memory
    assert (races["op"], races["errors"], races["passed"]) == ("racecheck", 2, False)
    assert "small step: done" in races["output"]
    assert done.returncode == 1
    assert "compute-sanitizer racecheck: 2 errors" in done.stdout


def test_a_step_is_planned_without_the_packages_of_the_store(tmp_path: Path) -> None:
    code = """
from benchmarks.gpu.report.planned import planned
from benchmarks.gpu.report.predictions import H200
from benchmarks.gpu.shapes import GPU
print(planned("step", GPU.steps["A"], H200).step_s > 0.008)
"""
    hidden = environment(PYTHONPATH=hide_packages(tmp_path))
    done = subprocess.run(
        [sys.executable, "-c", code], env=hidden, capture_output=True, text=True, check=False
    )
    assert done.stdout == "True\n", done.stderr


# --- options


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_without_a_gpu_the_error_names_the_way_out() -> None:
    done = run()
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1
    assert "no CUDA device" in done.stderr and "--interpret" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--minutes", "0"], "--minutes 0: expected more than 0"),
        (["--minutes", "nan"], "--minutes nan: expected more than 0"),
        (["--parts", "step", "speed"], "--parts speed: expected some of device cases"),
    ],
)
def test_invalid_options_are_refused(arguments: list[str], text: str) -> None:
    done = run("--interpret", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert text in done.stderr and len(done.stderr.splitlines()) == 1


def test_a_time_too_short_for_any_part_still_leaves_a_file(tmp_path: Path) -> None:
    out = tmp_path / "new" / "gpu.json"
    done = run("--interpret", "--minutes", "0.01", "--json", str(out))
    assert done.returncode == 0, done.stderr
    assert {part["status"] for part in parts_of(out).values()} == {"skipped"}
    assert len(parts_of(out)) == len(PARTS)
