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
    # The command was typed here: where the cluster has the code it also has this folder.
    here = [] if config.working_dir else [f"cd {shlex.quote(str(Path.cwd()))} || exit 1"]
    script = "\n".join([*here, *config.setup, f"exec {shlex.join(command)}"])
    # Ray takes sh; the lines are bash's, as on every other scheduler.
    entrypoint = f"exec bash -c {shlex.quote(script)}"
    try:
        job = connect(config.address).submit_job(
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
        return connect(row["address"]).get_job_info(row["job"])
    except RuntimeError as error:
        if "status code 404" in str(error):
            return None
        raise SchedulerError(f"Ray at {row['address']}: {error}") from error


def connect(address: str) -> JobSubmissionClient:
    """A client of the Jobs API, with the token that Ray's own processes would use.

    Raises:
        SchedulerError: no Ray answers there, or it does not know the token.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    token = _token()
    headers = {"Authorization": f"Bearer {token}"} if token else None
    try:
        return JobSubmissionClient(address, headers=headers)
    except AuthenticationError as error:
        raise SchedulerError(
            f"submit.address={address!r}: expected the token of that cluster in RAY_AUTH_TOKEN or "
            "in ~/.ray/auth_token"
        ) from error
    except (ConnectionError, RuntimeError) as error:
        raise SchedulerError(
            f"submit.address={address!r}: expected the dashboard of a running Ray cluster, as "
            f"http://127.0.0.1:8265 ({error}); start its head with `ray start --head "
            "--include-dashboard=true`"
        ) from error


def _token() -> str | None:
    """Ray's client looks for one only where RAY_AUTH_MODE says so, its clusters by themselves."""
    if "RAY_AUTH_TOKEN" in os.environ:
        return os.environ["RAY_AUTH_TOKEN"].strip()
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH", "~/.ray/auth_token")).expanduser()
    return path.read_text(encoding="utf-8").strip() if path.is_file() else None
