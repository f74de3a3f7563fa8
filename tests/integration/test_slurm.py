"""Test jobs on a real Slurm: preempted, requeued, killed, on two nodes, as an array."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch

from activation_store import StoreWriter
from cluster.jobs.slurm.commands import job_fields
from cluster.run_folder.metrics_log import logged_rows
from sae_core.checkpoint.folder import list_checkpoints, step_of
from sae_core.checkpoint.row_ranges import read_tensors
from tests.support.injection import last_step
from tests.support.paths import ROOT
from tests.support.slurm_server import slurm_server, wait_until, why_not

pytestmark = [
    pytest.mark.slow,
    pytest.mark.ray,
    pytest.mark.distributed,
    pytest.mark.timeout(600),
    pytest.mark.skipif(bool(why_not()), reason=why_not()),
]

STEPS, BATCH = 600, 256
OVERRIDES = (
    "experiment=none",
    "sae.k=6",
    "sae.auxk=8",
    "optim.lr=2e-3",
    f"train.batch_tokens={BATCH}",
    "train.sample_tokens=2000",
    "train.threads_per_rank=1",
    # Save only on a signal and at the end.
    "checkpoint.every_tokens=1000000000",
    "store.window_items=3",
    "store.buffer_tokens=2048",
    "logging.wandb=disabled",
    "logging.every_steps=5",
    "submit.stage=train",
)


@pytest.fixture(scope="module")
def slurm() -> Iterator[Path]:
    with slurm_server() as folder:
        yield folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a store of synthetic activations and an undisturbed run."""
    folder = tmp_path_factory.mktemp("jobs")
    rng = np.random.default_rng(0)
    directions = rng.normal(size=(128, 32)).astype(np.float32)
    writer = StoreWriter(folder / "store", {"acts": 32}, dtype="float32", shard_tokens=1024)
    for item in range(14):
        weights = rng.random((1024, 128)) * (rng.random((1024, 128)) < 0.05)
        writer.write_item(item, (weights @ directions).astype(np.float32))
    writer.finalise()
    launch(folder, "clean", "stage=train", "parallel.latent=2")
    return folder


def launch(folder: Path, name: str, *more: str, steps: int = STEPS, code: int = 0) -> str:
    place = [f"name={name}", f"store.path={folder / 'store'}", f"train.tokens={steps * BATCH}"]
    if not any(word.startswith("sae.n_latents") for word in more):
        place.append("sae.n_latents=300")
    command = [sys.executable, str(ROOT / "launch.py"), *place, *OVERRIDES, *more]
    done = subprocess.run(
        command,
        cwd=folder,
        env=os.environ | {"COLUMNS": "250"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


class Job:
    """The newest job of a run."""

    def __init__(self, folder: Path, name: str, slurm: Path) -> None:
        self.run_dir = folder / "runs" / name
        self._slurm = slurm
        row = json.loads((self.run_dir / "submit" / "jobs.json").read_text())[-1]
        self.id = row["job"]
        self.log = Path(row["log"])

    @property
    def fields(self) -> dict[str, str]:
        return job_fields(self.id) or {}

    def wait_for(self, what: str, timeout_s: float = 300) -> None:
        def reached() -> bool:
            state = self.fields["JobState"]
            failed = state in ("FAILED", "CANCELLED") and what != state
            assert not failed, f"{state}\n{self.log.read_text()}"
            return state == what

        try:
            wait_until(reached, f"job {self.id} is not {what}", self._slurm, timeout_s)
        except AssertionError as error:
            log = self.log.read_text() if self.log.exists() else "no log"
            raise AssertionError(f"{error}\n{self.fields}\n{log}") from None

    def wait_for_step(self, step: int) -> None:
        def reached() -> bool:
            return last_step(self.run_dir) >= step

        wait_until(reached, f"job {self.id} does not reach step {step}", self._slurm)

    def attempts(self) -> list[int | str]:
        rows = (self.run_dir / "submit" / "attempts.jsonl").read_text().splitlines()
        return [row.get("exit_code", row["event"]) for row in map(json.loads, rows)]

    def steps(self) -> list[int]:
        """List the steps of all metrics rows, repeated ones included."""
        return [row["step"] for row in logged_rows(self.run_dir)]

    def wait_until_gone(self) -> None:
        wait_until(lambda: not self.processes(), f"left of job {self.id}: {self.processes()}")

    def processes(self) -> dict[int, str]:
        """Return the command lines of the job's processes by process id."""
        mine, found = f"SLURM_JOB_ID={self.id}".encode(), {}
        for process in Path("/proc").glob("[0-9]*"):
            try:
                if mine in (process / "environ").read_bytes().split(b"\0"):
                    command = (process / "cmdline").read_text().replace("\0", " ")
                    found[int(process.name)] = command
            except OSError:
                continue
        return found


def assert_same_end(one: Path, other: Path) -> None:
    tensors = []
    for run_dir in (one, other):
        newest = list_checkpoints(run_dir / "checkpoints")[0]
        assert step_of(newest) == STEPS
        parts = [read_tensors(newest / part) for part in ("weights", "optimizer")]
        tensors.append(parts[0] | parts[1])
    assert tensors[0].keys() == tensors[1].keys()
    for name, tensor in tensors[0].items():
        assert torch.equal(tensor, tensors[1][name]), name


def test_preempted_jobs_save_and_requeue_and_end_with_the_same_weights(folder, slurm):
    """Warn one of two jobs as before its time limit, and preempt the other without grace."""
    jobs = {}
    commands = {"warned": "scancel --signal=USR1 --batch", "requeued": "scontrol requeue"}
    for name in commands:
        submitted = launch(folder, name, "stage=submit", "parallel.latent=2")
        jobs[name] = job = Job(folder, name, slurm)
        assert f"submit: job {job.id}," in submitted and f"stage=status name={name}" in submitted
    for name, command in commands.items():
        jobs[name].wait_for_step(50)
        subprocess.run([*command.split(), jobs[name].id], check=True)
    again = launch(folder, "warned", "stage=submit", "parallel.latent=2", code=2)
    assert "is in use by" in again or f"has job {jobs['warned'].id} (" in again
    for job in jobs.values():
        job.wait_for("COMPLETED")
        assert job.attempts() == ["start", 75, "start", 0], job.log.read_text()
        assert job.steps().count(5) == 1, "restarted without a checkpoint"
        assert_same_end(folder / "runs" / "clean", job.run_dir)
        job.wait_until_gone()
    status = launch(folder, "requeued", "stage=status")
    assert f"{jobs['requeued'].id} COMPLETED, requeued 1 times" in status


def test_two_nodes_preempted_by_an_urgent_job(folder, slurm):
    """In the grace period Slurm signals the steps, which run Ray, but not the batch process."""
    before = set(Path("/tmp").glob("ray-*"))
    launch(folder, "nodes", "stage=submit", "parallel.latent=2", "submit.nodes=2")
    job = Job(folder, "nodes", slurm)
    job.wait_for_step(50)
    raylets = [line for line in job.processes().values() if "/raylet/raylet " in line]
    assert len(raylets) == 2, job.log.read_text()
    urgent = ["sbatch", "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null"]
    subprocess.run([*urgent, "--wrap=sleep 1"], check=True, capture_output=True)
    job.wait_for("COMPLETED")
    assert job.attempts() == ["start", 75, "start", 0], job.log.read_text()
    assert job.steps().count(5) == 1, "restarted without a checkpoint"
    assert_same_end(folder / "runs" / "clean", job.run_dir)
    job.wait_until_gone()
    assert set(Path("/tmp").glob("ray-*")) <= before


def test_killed_and_cancelled_jobs_are_not_requeued_and_the_next_one_resumes(folder, slurm):
    options = ("stage=submit", f"checkpoint.every_tokens={20 * BATCH}")
    launch(folder, "killed", *options)
    first = Job(folder, "killed", slurm)
    first.wait_for_step(50)
    for process in first.processes():  # like the kernel when memory runs out
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    first.wait_for("FAILED")
    status = launch(folder, "killed", "stage=status")
    assert f"{first.id} FAILED" in status and "9; rerun stage=submit to resume" in status, status

    launch(folder, "killed", *options)
    second = Job(folder, "killed", slurm)
    assert second.id != first.id
    second.wait_for_step(200)
    subprocess.run(["scancel", second.id], check=True)
    second.wait_for("CANCELLED")
    wait_until(lambda: second.attempts() == ["start", "start", 75], "no end recorded", slurm)
    second.wait_until_gone()
    assert second.fields["JobState"] == "CANCELLED" and second.fields["Restarts"] == "0"
    assert second.steps().count(5) == 1, "restarted without a checkpoint"


def test_a_sweep_as_an_array_of_jobs(folder, slurm):
    launch(
        *(folder, "sweep", "stage=train", "sae.n_latents=100,200"),
        *("hydra/launcher=submitit_slurm", "hydra.launcher.cpus_per_task=1", "-m"),
        steps=20,
    )
    for n_latents in (100, 200):
        run_dir = folder / "runs" / f"sweep-n_latents{n_latents}"
        assert f"n_latents: {n_latents}" in (run_dir / "config.yaml").read_text()
        assert [step_of(path) for path in list_checkpoints(run_dir / "checkpoints")] == [20]
