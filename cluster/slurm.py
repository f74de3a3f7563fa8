"""Slurm's own commands, and what they say of a job."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

from cluster.errors import SchedulerError
from cluster.submitted import FOLDER

ATTEMPTS = "attempts.jsonl"
_OVER = (
    *("COMPLETED", "CANCELLED", "FAILED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "DEADLINE"),
    *("PREEMPTED", "BOOT_FAIL"),  # PreemptMode=CANCEL ends a job in the first
)
_TIMEOUT_S = 60.0


def call(*command: str) -> str:
    """Standard output of a command of Slurm's.

    Raises:
        SchedulerError: it is not there, does not answer, or refuses.
    """
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
        )
    except FileNotFoundError as error:
        raise SchedulerError(
            f"{command[0]}: not found; submit where Slurm's commands are, on a login node"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise SchedulerError(f"{command[0]}: no answer from Slurm in {_TIMEOUT_S:.0f} s") from error
    if done.returncode:
        raise SchedulerError(f"{command[0]}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def requeue(job: str) -> None:
    """Queues a running job again under its id; Slurm then ends this attempt of it.

    Does nothing to a job that Slurm is ending already: one that it has queued again itself, or
    that somebody cancelled, which would come to life again.

    Raises:
        SchedulerError: Slurm refuses.
    """
    if is_running(job):
        call("scontrol", "requeue", job)


def is_running(job: str) -> bool:
    """Whether the job runs and Slurm is not ending it.

    Raises:
        SchedulerError: Slurm does not answer.
    """
    fields = job_fields(job)
    return fields is not None and fields["JobState"] == "RUNNING"


def requeue_sweep_cell() -> None:
    """Queues this job again where it is one of Hydra's Slurm launcher, which does not itself."""
    if os.environ.get("SUBMITIT_EXECUTOR") == "slurm":
        requeue(os.environ["SLURM_JOB_ID"])


def job_fields(job: str) -> dict[str, str] | None:
    """`scontrol show job` by field; None where Slurm has forgotten the job (minutes after its end).

    Raises:
        SchedulerError: Slurm does not answer.
    """
    try:
        text = call("scontrol", "show", "job", "--oneliner", job)
    except SchedulerError as error:
        if "Invalid job id" in str(error):
            return None
        raise
    return dict(re.findall(r"(?:^| )([A-Za-z:/]+)=(\S*)", text))


def unfinished_state(row: dict[str, Any]) -> str | None:
    """State of a submitted job while it waits or runs, as PENDING.

    Raises:
        SchedulerError: Slurm does not answer.
    """
    fields = job_fields(row["job"])
    if fields is None or fields["JobState"].startswith(_OVER):
        return None
    return fields["JobState"]


def describe(row: dict[str, Any], run_dir: Path) -> str:
    """A line or two on a submitted job.

    Raises:
        SchedulerError: Slurm does not answer.
    """
    job = row["job"]
    fields = job_fields(job)
    text = _forgotten(job, run_dir) if fields is None else _known(job, fields)
    return f"{text}\nlog {row['log']}"


def _known(job: str, fields: dict[str, str]) -> str:
    state = fields["JobState"]
    text = f"{job} {state}"
    if fields.get("Reason", "None") != "None":
        text += f" ({fields['Reason']})"
    if state == "RUNNING":
        text += f" on {fields['NodeList']}, {fields['RunTime']} of {fields['TimeLimit']}"
    if fields.get("Restarts", "0") != "0":
        text += f", queued again {fields['Restarts']} times"
    if state.startswith(_OVER) and state != "COMPLETED":
        code, _, number = fields.get("ExitCode", "0:0").partition(":")
        text += f", signal {number}" if number not in ("", "0") else f", exit code {code}"
        text += "; stage=submit again resumes"
    return text


def _forgotten(job: str, run_dir: Path) -> str:
    """What the job itself wrote down, once Slurm no longer knows it."""
    path = run_dir / FOLDER / ATTEMPTS
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    rows = [row for row in map(json.loads, lines) if row["job"] == job]
    if rows and rows[-1]["event"] == "end":
        code = rows[-1]["exit_code"]
        return f"{job} ended with exit code {code}" + ("; stage=submit again resumes" * bool(code))
    return (
        f"{job} is over, and left no exit code: it was killed before it could (cancelled, out of "
        "memory, node lost); stage=submit again resumes"
    )
