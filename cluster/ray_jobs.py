"""Submits a run to a Ray cluster through its Jobs API, and asks what became of it.

The job is the driver; it joins the cluster, whose nodes share the run's folder. Ray stops a job
with SIGTERM to the driver, upon which the run saves a checkpoint, and kills it
`RAY_JOB_STOP_WAIT_TIME_S` later: a setting that the job brings with it.
"""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.errors import SchedulerError
from cluster.submit_config import SubmitConfig
from cluster.submitted import record_job

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

_AFTER_GRACE_S = 15
"""What a run may take to end, once its checkpoint is saved."""


def submit(config: SubmitConfig, name: str, run_dir: Path, command: list[str]) -> tuple[str, str]:
    """The job's id, and how to follow it.

    Args:
        config: of the job.
        name: of the run.
        run_dir: its folder.
        command: what the job runs.

    Raises:
        SchedulerError: no Ray answers there, or it refuses.
    """
    runtime_env: dict[str, Any] = {
        "env_vars": {
            "RAY_JOB_STOP_WAIT_TIME_S": str(config.signal_lead_s + _AFTER_GRACE_S),
            "PYTHONUNBUFFERED": "1",
        }
    }
    if config.working_dir is not None:
        runtime_env["working_dir"] = str(Path(config.working_dir).expanduser().resolve())
        runtime_env["excludes"] = [".git", ".venv", ".venv-peers", "runs"]
    entrypoint = "; ".join([*config.setup, f"exec {shlex.join(command)}"])
    try:
        job = _client(config.address).submit_job(
            entrypoint=entrypoint, runtime_env=runtime_env, metadata={"run": name}
        )
    except (RuntimeError, ValueError) as error:
        raise SchedulerError(f"submit.address={config.address!r}: Ray refuses: {error}") from error
    record_job(run_dir, "ray", job, command, address=config.address)
    return (
        f"{job} on {config.address}",
        f"ray job logs --follow --address {config.address} {job}",
    )


def unfinished_state(row: dict[str, Any]) -> str | None:
    """State of a submitted job while it waits or runs, as RUNNING.

    Raises:
        SchedulerError: no Ray answers: whether the job runs cannot be told.
    """
    info = _info(row)
    return None if info is None or info.status.is_terminal() else str(info.status.value)


def describe(row: dict[str, Any], _run_dir: Path) -> str:
    """A line or two on a submitted job.

    Raises:
        SchedulerError: no Ray answers.
    """
    info = _info(row)
    if info is None:
        return (
            f"{row['job']} is unknown to the Ray at {row['address']}: that cluster was started "
            "anew; stage=submit again resumes"
        )
    text = f"{row['job']} {info.status.value}"
    if info.status.is_terminal() and info.status.value != "SUCCEEDED":
        code = info.driver_exit_code
        text += f", exit code {code}" if code is not None else ""
        text += "; stage=submit again resumes"
    return f"{text}\nlog ray job logs --address {row['address']} {row['job']}"


def _info(row: dict[str, Any]) -> Any:
    try:
        return _client(row["address"]).get_job_info(row["job"])
    except RuntimeError as error:
        if "status code 404" in str(error):
            return None
        raise SchedulerError(f"Ray at {row['address']}: {error}") from error


def _client(address: str) -> JobSubmissionClient:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    from ray.job_submission import JobSubmissionClient

    try:
        return JobSubmissionClient(address)
    except (ConnectionError, RuntimeError) as error:
        raise SchedulerError(
            f"submit.address={address!r}: expected the dashboard of a running Ray cluster, as "
            f"http://127.0.0.1:8265 ({error}); start its head with `ray start --head "
            "--include-dashboard=true`"
        ) from error
