"""Test the batch script and the names of a sweep's cells."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path

import pytest
from hydra.conf import HydraConf

from cluster.jobs.backend import describe_job, unfinished_job
from cluster.jobs.slurm.batch_script import script
from cluster.run_folder.submitted_jobs import FOLDER, JOBS
from conf.multirun import cell_name, with_constant_keys
from conf.schema.submit import SubmitConfig, _seconds
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
    text = script(config, "big", run_dir, ["python", "launch.py", "data.path=my text.txt"])
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
    assert "--no-requeue" in script(SubmitConfig(max_requeues=0), "big", Path("/run"), ["true"])


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"scheduler": "pbs"}, "submit.scheduler='pbs'"),
        ({"nodes": 0}, "submit.nodes=0"),
        ({"time": "a day"}, "submit.time='a day'"),
        ({"time": "5"}, "more than twice submit.signal_lead_s=150"),
        ({"time": "0-0:05:00"}, "more than twice"),
        ({"signal_lead_s": 60}, "at least checkpoint.grace_s=120"),
        ({"sbatch": ["exclusive"]}, "an option of sbatch"),
        ({"partition": "gpu\nrm -rf x"}, "a text of one line"),
    ],
)
def test_invalid_settings_are_refused(change, expected):
    with pytest.raises(ConfigError, match=expected):
        SubmitConfig(**change).validate(grace_s=120)


def test_times_are_read_as_slurm_reads_them():
    times = ("90", "90:30", "24:00:00", "2-00", "1-02:30", "1-00:00:10")
    seconds = [5400, 5430, 86_400, 172_800, 95_400, 86_410]
    assert [_seconds(time) for time in times] == seconds


def name_of(arguments: list[str], cell: list[str]) -> str:
    """Return the name of `cell` in the sweep that `arguments` ask Hydra for."""
    hydra = HydraConf()
    (added,) = set(with_constant_keys(arguments)) - set(arguments)
    hydra.job.config.override_dirname.exclude_keys = added.partition("=")[2].strip("[]").split(",")
    hydra.overrides.task = cell
    return cell_name("demo", hydra)


def test_a_cell_is_named_after_what_varies():
    typed = ["-m", "sae.k=16,32", "optim.lr=1e-3,2e-3", "train.tokens=200", "store.path=a/b"]
    cell = ["sae.k=16", "optim.lr=1e-3", "train.tokens=200", "store.path=a/b"]
    assert name_of(typed, cell) == "demo-k16-lr0.001"


def test_cell_names_from_choices_paths_and_keys_with_equal_endings():
    assert name_of(["-m", "sae=topk,other"], ["sae=topk"]) == "demo-sae-topk"
    assert name_of(["-m", "store.path=a/b,c"], ["store.path=a/b"]) == "demo-path-a_b"
    typed = ["-m", "train.tokens=1,2", "data.tokens=3,4"]
    cell = ["train.tokens=1", "data.tokens=3"]
    assert name_of(typed, cell) == "demo-train.tokens1-data.tokens3"


def test_a_sweep_over_names_adds_nothing_and_one_run_is_not_a_sweep():
    assert name_of(["-m", "name=demo,other"], ["name=demo"]) == "demo"
    assert with_constant_keys(["sae.k=16"]) == ["sae.k=16"]


def test_flags_stay_before_or_after_all_overrides():
    assert with_constant_keys(["-m", "a=1,2", "b=3"])[:1] == ["-m"]
    assert with_constant_keys(["a=1,2", "b=3", "-m"])[-1] == "-m"


@pytest.mark.parametrize("state", ["PREEMPTED", "BOOT_FAIL", "CANCELLED by 1000"])
def test_a_finished_job_does_not_block_a_new_one(tmp_path, monkeypatch, state):
    (tmp_path / FOLDER).mkdir()
    write_json(tmp_path / FOLDER / JOBS, [{"job": "7", "log": "log"}])
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(f"#!/bin/sh\necho 'JobId=7 JobState={state} Reason=None ExitCode=0:0'\n")
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert unfinished_job(tmp_path) is None
    description = describe_job(tmp_path)
    assert description is not None and "rerun stage=submit to resume" in description
