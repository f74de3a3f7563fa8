"""Call Slurm's commands."""

from __future__ import annotations

import os
import re
import subprocess

from cluster.errors import SchedulerError

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
        raise SchedulerError(
            f"{command[0]} failed with exit code {done.returncode}: "
            f"{done.stderr.strip() or done.stdout.strip()}"
        )
    return done.stdout


def requeue(job: str) -> None:
    """Requeue a running job under the same id. Slurm then ends the current attempt.

    Do nothing if Slurm is already ending the job. Slurm may have requeued the job itself, or a user
    may have cancelled it, which requeueing would undo.

    Raises:
        SchedulerError: If Slurm does not answer, or refuses to requeue the job.
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
    """Requeue this job if Hydra's Slurm launcher started it, because the launcher does not."""
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
