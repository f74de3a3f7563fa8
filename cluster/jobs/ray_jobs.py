"""Submit a run to a Ray cluster through its Jobs API, and query the state of the job.

The job is the driver. It joins the cluster, whose nodes must share the run folder. To stop a job,
Ray sends SIGTERM to the driver, which then saves a checkpoint. Ray kills the driver
`RAY_JOB_STOP_WAIT_TIME_S` seconds later. The job sets that variable itself.
"""

from __future__ import annotations

import ipaddress
import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar
from urllib.parse import urlsplit

from cluster.errors import SchedulerError
from cluster.jobs.backend import Job, Place
from cluster.jobs.tracked import Submission, TrackedBackend
from cluster.run_folder.submitted_jobs import SubmittedJob
from conf.schema.submit import SubmitConfig
from foundation.errors import ConfigError

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

_AFTER_GRACE_S = 15
"""Seconds that a run may take to end after its checkpoint is saved."""


class RayJobs(TrackedBackend):
    """Jobs of a running Ray cluster whose nodes share this machine's folders."""

    end_command: ClassVar[str] = "ray job stop"

    def check(self, config: SubmitConfig, grace_s: float) -> None:
        """Check the cluster's address."""
        super().check(config, grace_s)
        if not config.address.startswith(("http://", "https://")):
            raise ConfigError(
                "submit.address",
                config.address,
                "an http or https address, such as http://127.0.0.1:8265",
            )

    def place(self, config: SubmitConfig) -> Place:
        """Return where the job starts: a copy of `submit.working_dir`, or the current folder."""
        return Place.SAME_FOLDER if config.working_dir is None else Place.OTHER_FOLDER

    def joins_ray(self, config: SubmitConfig) -> bool:
        """Return True: the job runs on a node of the cluster."""
        return True

    def submit(self, job: Job) -> Submission:
        """Submit the job. Ray assigns the id."""
        address = job.config.address
        try:
            job_id = connect(address).submit_job(
                entrypoint=_entrypoint(job),
                runtime_env=_runtime_env(job.config),
                metadata={"run": job.name},
            )
        except (RuntimeError, ValueError) as error:
            raise SchedulerError(
                f"submit.address={address!r}: Ray refused the job: {error}"
            ) from error
        return Submission(
            id=job_id,
            title=f"{job_id} on {address}",
            follow=f"ray job logs --follow --address {address} {job_id}",
            status_options=() if _is_this_machine(address) else (f"submit.address={address}",),
            details={"address": address},
        )

    def unfinished_state(self, job: SubmittedJob, config: SubmitConfig) -> str | None:
        """Return the state of a submitted job, such as RUNNING, or None if it has ended."""
        info = _info(job, config)
        return None if info is None or info.status.is_terminal() else str(info.status.value)

    def describe(self, job: SubmittedJob, config: SubmitConfig) -> str:
        """Describe a submitted job in one line, followed by a line with a command for its log."""
        info, address = _info(job, config), job.details["address"]
        if info is None:
            return (
                f"{job.id} is unknown to the Ray cluster at {address}, which has probably been "
                "restarted since; rerun stage=submit to resume"
            )
        text = f"{job.id} {info.status.value}"
        if info.status.is_terminal() and info.status.value != "SUCCEEDED":
            code = info.driver_exit_code
            text += f", exit code {code}" if code is not None else ""
            text += "; rerun stage=submit to resume"
        return f"{text}\nlog ray job logs --address {address} {job.id}"


def _is_this_machine(address: str) -> bool:
    host = urlsplit(address).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _entrypoint(job: Job) -> str:
    """Return the shell command of the job: change to its folder, set up, run the driver."""
    # If working_dir is not set, the cluster shares the code's file system, so this folder exists on
    # its nodes.
    uploaded = job.config.working_dir is not None
    here = [] if uploaded else [f"cd {shlex.quote(str(Path.cwd()))} || exit 1"]
    script = "\n".join([*here, *job.config.setup, f"exec {shlex.join(job.command)}"])
    # Ray runs the entrypoint with sh, but submit.setup holds lines for bash.
    return f"exec bash -c {shlex.quote(script)}"


def _runtime_env(config: SubmitConfig) -> dict[str, Any]:
    runtime_env: dict[str, Any] = {
        "env_vars": {
            "RAY_JOB_STOP_WAIT_TIME_S": str(config.signal_lead_s + _AFTER_GRACE_S),
            "PYTHONUNBUFFERED": "1",
        }
    }
    if config.working_dir is not None:
        runtime_env["working_dir"] = str(Path(config.working_dir).expanduser().resolve())
        runtime_env["excludes"] = [".git", ".venv", ".venv-peers", "runs"]
    return runtime_env


def _info(job: SubmittedJob, config: SubmitConfig) -> Any:
    """Return Ray's information about the job, or None if the cluster does not know the job.

    Raises:
        SchedulerError: If the cluster does not report the state, which is then unknown, or if the
            address is not known to be the user's.
    """
    address = job.details["address"]
    # The run folder may be untrusted, and `connect` sends the user's token.
    if address.rstrip("/") != config.address.rstrip("/") and not _is_this_machine(address):
        raise SchedulerError(
            f"job {job.id} was submitted to {address}: expected submit.address={config.address}, "
            f"the only cluster to which this cluster's token may be sent; set "
            f"submit.address={address} if you trust it"
        )
    try:
        return connect(address).get_job_info(job.id)
    except RuntimeError as error:
        if "status code 404" in str(error):
            return None
        raise SchedulerError(
            f"the Ray cluster at {address} did not report the state of job {job.id}: {error}; try "
            "again later"
        ) from error


def connect(address: str) -> JobSubmissionClient:
    """Return a client of the Jobs API that sends the same token as Ray's own processes.

    Raises:
        SchedulerError: If no Ray cluster answers at `address`, or authentication fails.
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
            f"submit.address={address!r}: authentication failed; put this cluster's token in "
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

    Ray clusters find the token by themselves, but Ray's client looks for a token only if
    RAY_AUTH_MODE is set.
    """
    if "RAY_AUTH_TOKEN" in os.environ:
        return os.environ["RAY_AUTH_TOKEN"].strip()
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH", "~/.ray/auth_token")).expanduser()
    return path.read_text(encoding="utf-8").strip() if path.is_file() else None


RAY_JOBS = RayJobs()
