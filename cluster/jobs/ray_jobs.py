"""Submit a run to a Ray cluster through its Jobs API, and query the state of the job.

The job is the driver. It joins the cluster, whose nodes must share the run folder. To stop a job,
Ray sends SIGTERM to the driver, on which the run saves a checkpoint, and kills it
`RAY_JOB_STOP_WAIT_TIME_S` seconds later. The job sets that variable itself.
"""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.errors import SchedulerError
from cluster.run_folder.submitted_jobs import record_job
from conf.schema.submit import SubmitConfig

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

_AFTER_GRACE_S = 15
"""Seconds that a run may take to end after its checkpoint is saved."""


def submit(config: SubmitConfig, name: str, run_dir: Path, command: list[str]) -> tuple[str, str]:
    """Submit the job and record it in the run folder.

    Args:
        config: Settings of the job.
        name: Name of the run.
        run_dir: Folder of the run.
        command: Command that the job runs.

    Returns:
        The job's id with the address of its cluster, and a command that follows the job's log.

    Raises:
        SchedulerError: If no Ray cluster answers at `config.address`, or it refuses the job.
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
    # Without working_dir the cluster shares the code's file system, so this folder exists there.
    here = [] if config.working_dir else [f"cd {shlex.quote(str(Path.cwd()))} || exit 1"]
    script = "\n".join([*here, *config.setup, f"exec {shlex.join(command)}"])
    # Ray runs the entrypoint with sh, but submit.setup holds lines for bash.
    entrypoint = f"exec bash -c {shlex.quote(script)}"
    try:
        job = connect(config.address).submit_job(
            entrypoint=entrypoint, runtime_env=runtime_env, metadata={"run": name}
        )
    except (RuntimeError, ValueError) as error:
        raise SchedulerError(
            f"submit.address={config.address!r}: Ray refused the job: {error}"
        ) from error
    record_job(run_dir, "ray", job, command, address=config.address)
    return (
        f"{job} on {config.address}",
        f"ray job logs --follow --address {config.address} {job}",
    )


def unfinished_state(row: dict[str, Any]) -> str | None:
    """Return the state of a submitted job, such as RUNNING, or None if it has ended.

    Raises:
        SchedulerError: If no Ray cluster answers, so that the state is unknown.
    """
    info = _info(row)
    return None if info is None or info.status.is_terminal() else str(info.status.value)


def describe(row: dict[str, Any], _run_dir: Path) -> str:
    """Describe a submitted job in one line, followed by a line with a command for its log.

    Raises:
        SchedulerError: If no Ray cluster answers.
    """
    info = _info(row)
    if info is None:
        return (
            f"{row['job']} is unknown to the Ray cluster at {row['address']}, which was restarted "
            "since; rerun stage=submit to resume"
        )
    text = f"{row['job']} {info.status.value}"
    if info.status.is_terminal() and info.status.value != "SUCCEEDED":
        code = info.driver_exit_code
        text += f", exit code {code}" if code is not None else ""
        text += "; rerun stage=submit to resume"
    return f"{text}\nlog ray job logs --address {row['address']} {row['job']}"


def _info(row: dict[str, Any]) -> Any:
    try:
        return connect(row["address"]).get_job_info(row["job"])
    except RuntimeError as error:
        if "status code 404" in str(error):
            return None
        raise SchedulerError(f"Ray at {row['address']}: {error}") from error


def connect(address: str) -> JobSubmissionClient:
    """Return a client of the Jobs API that sends the same token as Ray's own processes would.

    Raises:
        SchedulerError: If no Ray cluster answers at `address`, or it rejects the token.
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
            f"submit.address={address!r}: the cluster rejected the token; expected its token in "
            "RAY_AUTH_TOKEN or in ~/.ray/auth_token"
        ) from error
    except (ConnectionError, RuntimeError) as error:
        raise SchedulerError(
            f"submit.address={address!r}: expected the dashboard of a running Ray cluster, such as "
            f"http://127.0.0.1:8265 ({error}); start its head with `ray start --head "
            "--include-dashboard=true`"
        ) from error


def _token() -> str | None:
    """Return the cluster's token, or None if there is none.

    Ray's clusters find the token by themselves, but its client looks for one only if RAY_AUTH_MODE
    is set.
    """
    if "RAY_AUTH_TOKEN" in os.environ:
        return os.environ["RAY_AUTH_TOKEN"].strip()
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH", "~/.ray/auth_token")).expanduser()
    return path.read_text(encoding="utf-8").strip() if path.is_file() else None
