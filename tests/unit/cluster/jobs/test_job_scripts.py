"""Run job scripts in their shell: setup lines, working folder and command."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser

from activation_store.config import MixedStore
from cluster.jobs import ray_jobs
from cluster.jobs import stage as jobs_stage
from cluster.jobs.backend import Job
from cluster.jobs.ray_jobs import RAY_JOBS
from cluster.jobs.skypilot import SKYPILOT
from cluster.jobs.slurm import batch_script
from cluster.run_folder.submitted_jobs import FOLDER
from conf.schema.data import MixedText
from conf.schema.run import RunConfig
from conf.schema.submit import SubmitConfig
from launch import _make_paths_absolute

PROBE = """
import json, os, sys
names = {"A", "B"} & set(os.environ)
print(json.dumps([os.getcwd(), {name: os.environ[name] for name in sorted(names)}, sys.argv[1:]]))
"""
COMMAND = [sys.executable, "-c", PROBE, "my text.txt"]
SHELLS = {"slurm": "bash", "ray": "sh", "skypilot": "bash"}
"""The shell of each scheduler; Ray passes its entrypoint to `subprocess.Popen(shell=True)`."""


class Jobs:
    """A fake Ray job client that records what `ray_jobs` sends."""

    def __init__(self) -> None:
        self.sent: dict[str, Any] = {}

    def submit_job(self, **sent: Any) -> str:
        self.sent = sent
        return "raysubmit_1"


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> Jobs:
    jobs = Jobs()
    monkeypatch.setattr(ray_jobs, "connect", lambda address: jobs)
    return jobs


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Change to the folder where the command is typed, and return it."""
    (tmp_path / "my code").mkdir()
    (tmp_path / "run" / FOLDER).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "my code")
    return tmp_path / "my code"


def script(scheduler: str, setup: list[str], run_dir: Path, jobs: Jobs) -> str:
    config = SubmitConfig(scheduler=scheduler, setup=setup, image="an/image", volume="claim")
    job = Job("job", run_dir, COMMAND, config, 120.0)
    if scheduler == "slurm":
        return batch_script.script(job)
    if scheduler == "ray":
        RAY_JOBS.submit(job)
        return str(jobs.sent["entrypoint"])
    return str(yaml.safe_load(SKYPILOT.render(job))["run"])


def stub(folder: Path, name: str, text: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/bash\n{text}\n")
    (folder / name).chmod(0o755)


def execute(text: str, shell: str, folder: Path, **more: str) -> subprocess.CompletedProcess[str]:
    """Run `text` in `folder`, where the job starts, with stubs for the scheduler's commands."""
    stubs = folder / "stubs"
    stub(stubs, "srun", "exec cat > /dev/null")
    path = f"{stubs}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    place = {"SLURM_JOB_ID": "1", "SLURM_JOB_NUM_NODES": "1", "PATH": path, **more}
    return subprocess.run(
        [shell, "-c", text],
        cwd=folder,
        env=os.environ | place,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("scheduler", SHELLS)
def test_setup_lines_run_unchanged(scheduler: str, tmp_path: Path, here: Path, jobs: Jobs) -> None:
    setup = [
        "source /dev/stdin <<< 'export A=1'  # bash syntax, as used to activate environments",
        "if true; then",
        "  export B='2 3'",
        "fi",
        "sleep 0 &",
        "false",
    ]
    text = script(scheduler, setup, tmp_path / "run", jobs)
    done = execute(text, SHELLS[scheduler], tmp_path)
    assert done.returncode == 0, done.stderr
    begins_in = tmp_path if scheduler == "skypilot" else here
    assert json.loads(done.stdout) == [str(begins_in), {"A": "1", "B": "2 3"}, ["my text.txt"]]


@pytest.mark.parametrize("scheduler", SHELLS)
def test_a_setup_line_can_end_the_job(
    scheduler: str, tmp_path: Path, here: Path, jobs: Jobs
) -> None:
    text = script(scheduler, ["test -e /nowhere || exit 3", "true"], tmp_path / "run", jobs)
    done = execute(text, SHELLS[scheduler], tmp_path)
    assert (done.returncode, done.stdout) == (3, "")


@pytest.mark.parametrize("scheduler", ["slurm", "ray"])
def test_nothing_runs_if_the_folder_is_missing(
    scheduler: str, tmp_path: Path, here: Path, jobs: Jobs
) -> None:
    text = script(scheduler, ["echo set up"], tmp_path / "run", jobs)
    here.rename(tmp_path / "elsewhere")
    done = execute(text, SHELLS[scheduler], tmp_path)
    assert (done.returncode, done.stdout) == (1, "") and "my code" in done.stderr


def test_code_sent_to_ray_runs_in_its_copy_with_local_paths(
    tmp_path: Path, here: Path, jobs: Jobs
) -> None:
    (here / "code").mkdir()
    (here / "code" / "launch.py").write_text(PROBE)
    (here / "texts").mkdir()
    setup = ["test -e launch.py || exit 4"]
    config = RunConfig(name="job", runs_dir="runs", cache_dir="cache")
    config.submit = SubmitConfig(scheduler="ray", working_dir="code", setup=setup)
    config.store.path, config.data.path, config.model.path = "store", "texts", "org/a-model"
    odd = 'a "b, c\\'
    config.store.mixture = [MixedStore(odd, 2.0), MixedStore("s3://bucket/d", 1e-5)]
    (here / "more").mkdir()
    config.data.mixture = [MixedText("more", 3.0, split="test"), MixedText("org/text")]
    _make_paths_absolute(config)
    typed = ["stage=submit", "data.path=texts", "store.path=store", "model.path=org/a-model"]
    typed.append("store.mixture=[{path:x}]")
    jobs_stage.run(config, here / "runs" / "job", typed)
    assert jobs.sent["runtime_env"]["working_dir"] == str(here / "code")
    sent = tmp_path / "sent"
    shutil.copytree(here / "code", sent)
    done = execute(jobs.sent["entrypoint"], "sh", sent)
    assert done.returncode == 0, done.stderr
    folder, _, arguments = json.loads(done.stdout)
    assert folder == str(sent)
    mixture = next(one for one in arguments if one.startswith("store.mixture="))
    arguments.remove(mixture)
    assert OverridesParser.create().parse_override(mixture).value() == [
        {"path": str(here / odd), "weight": 2.0},
        {"path": "s3://bucket/d", "weight": 1e-5},
    ]
    mixture = next(one for one in arguments if one.startswith("data.mixture="))
    arguments.remove(mixture)
    assert OverridesParser.create().parse_override(mixture).value() == [
        {"path": str(here / "more"), "weight": 3.0, "split": "test"},
        {"path": "org/text", "weight": 1.0},
    ]
    assert sorted(arguments) == [
        f"cache_dir={here}/cache",
        "cluster=join",
        f"data.path={here}/texts",
        "model.path=org/a-model",
        "name=job",
        f"runs_dir={here}/runs",
        "stage=pipeline",
        f"store.path={here}/store",
    ]


@pytest.mark.parametrize(("came", "code", "driven"), [(0, 7, True), (1, 1, False)])
def test_the_first_sky_node_ends_with_its_driver_or_if_others_do_not_join(
    tmp_path: Path, came: int, code: int, driven: bool
) -> None:
    config = SubmitConfig(nodes=2, image="an/image", volume="claim", setup=["export A=1"])
    python = tmp_path / "my python"
    command = [str(python), "launch.py", "my text.txt"]
    task = yaml.safe_load(SKYPILOT.render(Job("job", tmp_path, command, config, 120.0)))
    stub(tmp_path, python.name, f'[ "$1" != -m ] || exit {came}\nprintf "%s|" $A "$@"\nexit 7')
    stub(tmp_path / "stubs", "ray", f"echo $$ > '{tmp_path}/head'; exec sleep 60")
    place = {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NODE_RANK": "0"}
    done = execute(task["run"], "bash", tmp_path, **place)
    assert done.returncode == code, done.stderr
    said = "1|launch.py|my text.txt|cluster.address=10.0.0.1:6390|"
    assert done.stdout == (said if driven else "")
