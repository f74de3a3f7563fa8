"""Add a job backend from outside, and take a run through it with the command line."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import patch

import pytest

import launch
from cluster.jobs.backend import BACKENDS, Job, JobBackend, Place
from cluster.jobs.tracked import Submission, TrackedBackend
from cluster.run_folder.submitted_jobs import SubmittedJob, submitted_jobs
from conf.schema.submit import SubmitConfig
from foundation.errors import ConfigError
from tests.support.paths import ROOT

HEAVY = {"torch", "ray", "deepspeed", "transformers", "zarr", "wandb", "numpy"}
Launch = Callable[..., tuple[int, str, str]]


class Spool(TrackedBackend):
    """Write each job into a folder, where it waits until a user runs and deletes it."""

    end_command = "rm"

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def check(self, config: SubmitConfig, grace_s: float) -> None:
        if config.nodes != 1:
            raise ConfigError("submit.nodes", config.nodes, "1, because a spool has one machine")

    def place(self, config: SubmitConfig) -> Place:
        return Place.SAME_FOLDER

    def joins_ray(self, config: SubmitConfig) -> bool:
        return False

    def submit(self, job: Job) -> Submission:
        path = self.folder / f"{job.name}-{len(list(self.folder.iterdir()))}"
        path.write_text(shlex.join(job.command))
        return Submission(path.name, f"{path.name} in a spool", "ls", {"spooled": str(path)})

    def unfinished_state(self, job: SubmittedJob, config: SubmitConfig) -> str | None:
        return "SPOOLED" if Path(job.details["spooled"]).exists() else None

    def describe(self, job: SubmittedJob, config: SubmitConfig) -> str:
        return f"{job.id} {self.unfinished_state(job, config) or 'TAKEN'}"


class Note(JobBackend):
    """Write the command of a job in a container whose Ray is running already."""

    def check(self, config: SubmitConfig, grace_s: float) -> None:
        pass

    def place(self, config: SubmitConfig) -> Place:
        return Place.CONTAINER

    def joins_ray(self, config: SubmitConfig) -> bool:
        return True

    def hand_over(self, job: Job) -> list[str]:
        (job.folder / "note").write_text(shlex.join(job.command))
        return ["noted"]


@pytest.fixture
def spool(tmp_path: Path) -> Iterator[Path]:
    """Register the backend `spool`, and return its folder."""
    folder = tmp_path / "spool"
    folder.mkdir()
    with BACKENDS.registered("spool", Spool(folder)):
        yield folder


@pytest.fixture
def run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Launch]:
    """Yield a function that runs launch.py in this process: exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def run_launch(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [str(ROOT / "launch.py"), "name=toy", *arguments])
        code = 0
        try:
            launch.main()
        except SystemExit as error:
            code = int(error.code or 0)
        return code, *capsys.readouterr()

    with patch.dict(os.environ, {"COLUMNS": "250"}):  # launch.py sets variables for its children
        yield run_launch


def test_a_registered_backend_takes_a_run(spool: Path, tmp_path: Path, run: Launch) -> None:
    submit = ("stage=submit", "submit.scheduler=spool", "submit.stage=status", "sae.k=16")
    code, out, err = run(*submit)
    assert code == 0, err
    assert out.splitlines() == [
        "submit: job toy-0 in a spool",
        "follow it with: python launch.py stage=status name=toy; ls",
    ]
    run_dir = tmp_path / "runs" / "toy"
    assert "k: 16" in (run_dir / "config.yaml").read_text()
    (recorded,) = submitted_jobs(run_dir)
    assert (recorded.scheduler, recorded.id) == ("spool", "toy-0")
    assert recorded.details == {"spooled": str(spool / "toy-0")}

    assert "toy-0 SPOOLED" in run("stage=status")[1]
    code, _, err = run(*submit)
    assert code == 2 and "already has job toy-0 (SPOOLED)" in err and "end it with rm\n" in err
    # A waiting job also blocks a job of another backend; the error says how to end it.
    code, _, err = run("stage=submit", "submit=slurm")
    assert code == 2 and "end it with rm\n" in err

    words = shlex.split((spool / "toy-0").read_text())
    assert words == recorded.command
    assert words == [
        *(sys.executable, str(ROOT / "launch.py")),
        *("sae.k=16", "stage=status", "name=toy", f"runs_dir={tmp_path / 'runs'}"),
    ]
    done = subprocess.run(words, cwd="/", capture_output=True, text=True, check=True)
    assert "status: toy" in done.stdout

    (spool / "toy-0").unlink()
    assert "toy-0 TAKEN" in run("stage=status")[1]
    code, out, err = run(*submit)
    assert code == 0 and "job toy-0 in a spool" in out, err
    assert len(submitted_jobs(run_dir)) == 2


def test_a_backend_of_another_place_gets_another_command(tmp_path: Path, run: Launch) -> None:
    with BACKENDS.registered("note", Note()):
        code, out, err = run(
            *("stage=submit", "submit.scheduler=note", "submit.launch=[python,/app/launch.py]"),
            *("sae.k=16", "submit.mount=/data"),
        )
    assert (code, out) == (0, "noted\n"), err
    run_dir = tmp_path / "runs" / "toy"
    assert (run_dir / "submit" / "note").read_text() == (
        "python /app/launch.py cluster=join sae.k=16 stage=pipeline name=toy runs_dir=/data "
        "cache_dir=/data/.cache"
    )
    assert [path.name for path in run_dir.iterdir()] == ["submit"]  # the run is elsewhere


def test_a_backend_refuses_settings_before_any_work(
    spool: Path, tmp_path: Path, run: Launch
) -> None:
    code, out, err = run("stage=submit", "submit.scheduler=spool", "submit.nodes=2")
    assert (code, out) == (2, "")
    assert err == "error: submit.nodes=2: expected 1, because a spool has one machine\n"
    assert not (tmp_path / "runs").exists() and not list(spool.iterdir())


def test_a_job_of_a_backend_that_is_gone_is_still_listed(tmp_path: Path, run: Launch) -> None:
    (tmp_path / "spool").mkdir()
    with BACKENDS.registered("spool", Spool(tmp_path / "spool")):
        assert run("stage=submit", "submit.scheduler=spool")[0] == 0
    code, out, err = run("stage=status")
    assert code == 0 and "scheduler='spool': expected one of: slurm, ray" in out, err
    code, _, err = run("stage=submit", "submit=slurm")
    assert code == 2 and "jobs.json: scheduler='spool': expected one of: slurm, ray" in err


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ("submit.scheduler=pbs", "'pbs': expected one of: slurm, ray, kuberay, skypilot\n"),
        ("submit.nodes=0", "submit.nodes=0: expected at least 1"),
        ("submit.time=5", "more than twice submit.signal_lead_s=150"),
        ("submit=ray submit.signal_lead_s=60", "at least checkpoint.grace_s=120"),
        ("submit=kuberay", "submit.image=None"),
        ("submit=skypilot submit.image=i submit.volume=v submit.gpu=H100", "submit.gpu='H100'"),
        ("submit.stage=train sae.k=5000", "between 1 and sae.n_latents=4096"),
    ],
)
def test_invalid_settings_end_at_once_and_load_nothing_heavy(
    tmp_path: Path, overrides: str, expected: str
) -> None:
    code = (
        "import atexit, sys, launch\n"
        f"atexit.register(lambda: print(sorted({HEAVY} & set(sys.modules))))\n"
        "launch.main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "stage=submit", *overrides.split()],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2 and expected in done.stderr, done.stderr
    assert done.stdout == "[]\n"
    assert list(tmp_path.iterdir()) == []


def test_every_built_in_backend_can_be_imported() -> None:
    assert [name for name, backend in BACKENDS.items() if isinstance(backend, JobBackend)] == [
        *("slurm", "ray", "kuberay", "skypilot")
    ]
