"""Test the batch script, the settings and the states of Slurm jobs."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path

import pytest

from cluster.jobs.backend import Job
from cluster.jobs.slurm.backend import SLURM, seconds
from cluster.jobs.slurm.batch_script import script
from cluster.jobs.tracked import check_no_unfinished_job, describe_newest_job
from cluster.run_folder.submitted_jobs import FOLDER, JOBS
from conf.schema.submit import SubmitConfig
from foundation.atomic_files import write_json
from foundation.errors import ConfigError


def test_the_script_follows_the_config(tmp_path):
    config = SubmitConfig(
        partition="gpu",
        nodes=2,
        gpus_per_node=8,
        time="24:00:00",
        setup=["module load cuda"],
        sbatch=["--exclusive"],
    )
    run_dir = tmp_path / "a run 100%"
    command = ["python", "launch.py", "data.path=my text.txt"]
    text = script(Job("big", run_dir, command, config, 120.0))
    options = [line.removeprefix("#SBATCH ") for line in text.splitlines() if "#SBATCH" in line]
    assert options == [
        "--job-name=big",
        f"--output='{tmp_path}/a run 100%%/submit/slurm-%j.log'",
        "--open-mode=append",
        "--signal=B:USR1@150",
        "--nodes=2",
        "--ntasks-per-node=1",
        "--partition=gpu",
        "--gpus-per-node=8",
        "--time=24:00:00",
        "--requeue",
        "--exclusive",
    ]
    lines = text.splitlines()
    assert lines[-2] == "module load cuda"
    words = shlex.split(lines[-1])
    assert words[:1] == ["exec"] and words[2:6] == [
        "-m",
        "cluster.jobs.slurm.job",
        str(run_dir),
        "100",
    ]
    assert words[6:] == ["--", "python", "launch.py", "data.path=my text.txt"]
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)
    once = Job("big", Path("/run"), ["true"], SubmitConfig(max_requeues=0), 120.0)
    assert "--no-requeue" in script(once)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"time": "a day"}, "submit.time='a day'"),
        ({"time": "5"}, "more than twice submit.signal_lead_s=150"),
        ({"time": "0-0:05:00"}, "more than twice"),
        ({"signal_lead_s": 60}, "at least checkpoint.grace_s=120"),
        ({"sbatch": ["exclusive"]}, "an option of sbatch"),
        ({"partition": "gpu\nrm -rf x"}, "expected a single line"),
    ],
)
def test_invalid_settings_are_refused(change, expected):
    with pytest.raises(ConfigError, match=expected):
        SLURM.check(SubmitConfig(**change), grace_s=120)


@pytest.mark.parametrize("change", [{"nodes": 0}, {"cpus_per_task": 0}, {"max_requeues": -1}])
def test_impossible_numbers_are_refused_for_every_backend(change):
    with pytest.raises(ConfigError, match=f"submit.{next(iter(change))}="):
        SubmitConfig(**change).validate()


def test_times_are_read_as_slurm_reads_them():
    times = ("90", "90:30", "24:00:00", "2-00", "1-02:30", "1-00:00:10")
    expected = [5400, 5430, 86_400, 172_800, 95_400, 86_410]
    assert [seconds(time) for time in times] == expected


@pytest.mark.parametrize("state", ["PREEMPTED", "BOOT_FAIL", "CANCELLED by 1000"])
def test_a_finished_job_does_not_block_a_new_one(tmp_path, monkeypatch, state):
    (tmp_path / FOLDER).mkdir()
    write_json(tmp_path / FOLDER / JOBS, [{"job": "7", "log": "log"}])
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(f"#!/bin/sh\necho 'JobId=7 JobState={state} Reason=None ExitCode=0:0'\n")
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    check_no_unfinished_job(tmp_path, SubmitConfig())
    description = describe_newest_job(tmp_path, SubmitConfig())
    assert description is not None and "rerun stage=submit to resume" in description
