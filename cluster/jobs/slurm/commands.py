"""Call Slurm's commands, and describe the state of a job."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

from cluster.errors import SchedulerError
from cluster.run_folder.submitted_jobs import FOLDER

ATTEMPTS = "attempts.jsonl"
_OVER = (
    *("COMPLETED", "CANCELLED", "FAILED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "DEADLINE"),
    *("PREEMPTED", "BOOT_FAIL"),  # with PreemptMode=CANCEL a job ends as PREEMPTED
)
"""States of a job that has ended."""
_TIMEOUT_S = 60.0


def call(*command: str) -> str:
    """Run one of Slurm's commands and return its standard output.

    Raises:
        SchedulerError: If the command is not found, does not answer in time, or fails.
    """
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
        )
    except FileNotFoundError as error:
        raise SchedulerError(
            f"{command[0]}: command not found; run this on a machine with Slurm's commands, such "
            "as a login node"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise SchedulerError(
            f"{command[0]}: no answer from Slurm within {_TIMEOUT_S:.0f} s; try again later"
        ) from error
    if done.returncode:
        raise SchedulerError(f"{command[0]}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def requeue(job: str) -> None:
    """Requeue a running job under the same id; Slurm then ends its current attempt.

    Do nothing if Slurm is already ending the job. Slurm may have requeued it itself; or a user may
    have cancelled it, and requeueing would undo that.

    Raises:
        SchedulerError: If Slurm does not answer or refuses.
    """
    if is_running(job):
        call("scontrol", "requeue", job)


def is_running(job: str) -> bool:
    """Return True if the job is running and Slurm is not ending it.

    Raises:
        SchedulerError: If Slurm does not answer.
    """
    fields = job_fields(job)
    return fields is not None and fields["JobState"] == "RUNNING"


def requeue_sweep_cell() -> None:
    """Requeue this job if Hydra's Slurm launcher started it, as the launcher does not do so."""
    if os.environ.get("SUBMITIT_EXECUTOR") == "slurm":
        requeue(os.environ["SLURM_JOB_ID"])


def job_fields(job: str) -> dict[str, str] | None:
    """Return the fields of `scontrol show job`, or None if Slurm no longer knows the job.

    Slurm drops a job's record minutes after the job has ended.

    Raises:
        SchedulerError: If Slurm does not answer.
    """
    try:
        text = call("scontrol", "show", "job", "--oneliner", job)
    except SchedulerError as error:
        if "Invalid job id" in str(error):
            return None
        raise
    return dict(re.findall(r"(?:^| )([A-Za-z:/]+)=(\S*)", text))


def unfinished_state(row: dict[str, Any]) -> str | None:
    """Return the state of a submitted job, such as PENDING, or None if it has ended.

    Raises:
        SchedulerError: If Slurm does not answer.
    """
    fields = job_fields(row["job"])
    if fields is None or fields["JobState"].startswith(_OVER):
        return None
    return fields["JobState"]


def describe(row: dict[str, Any], run_dir: Path) -> str:
    """Describe a submitted job in one line, followed by a line with its log file.

    Raises:
        SchedulerError: If Slurm does not answer.
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
        text += f", requeued {fields['Restarts']} times"
    if state.startswith(_OVER) and state != "COMPLETED":
        code, _, number = fields.get("ExitCode", "0:0").partition(":")
        text += f", signal {number}" if number not in ("", "0") else f", exit code {code}"
        text += "; rerun stage=submit to resume"
    return text


def _forgotten(job: str, run_dir: Path) -> str:
    """Describe a job that Slurm no longer knows, from what the job itself recorded."""
    path = run_dir / FOLDER / ATTEMPTS
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    rows = [row for row in map(json.loads, lines) if row["job"] == job]
    if rows and rows[-1]["event"] == "end":
        code = rows[-1]["exit_code"]
        return f"{job} ended with exit code {code}" + (
            "; rerun stage=submit to resume" * bool(code)
        )
    return (
        f"{job} ended without recording an exit code: it was killed (cancelled, out of memory or "
        "node lost); rerun stage=submit to resume"
    )
