"""Backends that submit jobs and query their state. Check and describe a run's newest job."""

from __future__ import annotations

import shlex
import time
from abc import abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from cluster.jobs.backend import BACKENDS, Job, JobBackend
from cluster.run_folder.errors import RunDirError
from cluster.run_folder.submitted_jobs import (
    FOLDER,
    JOBS,
    SubmittedJob,
    record_job,
    submitted_jobs,
)
from conf.schema.submit import SubmitConfig
from foundation.errors import ConfigError, FoundryError


@dataclass(frozen=True)
class Submission:
    """A job that a scheduler has accepted."""

    id: str
    """Id of the job in its scheduler."""
    title: str
    """Description of the job for the user: its id and location."""
    follow: str
    """Shell command that follows the job's log."""
    details: dict[str, str] = field(default_factory=dict)
    """Values needed later to find the job or its log. They are kept in the run folder."""
    status_options: tuple[str, ...] = ()
    """Settings that stage=status needs to query the job, such as `submit.address=...`."""


class TrackedBackend(JobBackend):
    """A scheduler that accepts jobs from this machine. Each job is recorded in its run folder."""

    end_command: ClassVar[str]
    """Command that ends the job whose id follows it, such as "scancel"."""

    def check(self, config: SubmitConfig, grace_s: float) -> None:
        """Check that a job has enough time for a last checkpoint after it is told to stop."""
        if config.signal_lead_s < grace_s:
            raise ConfigError(
                "submit.signal_lead_s",
                config.signal_lead_s,
                f"at least checkpoint.grace_s={grace_s:g}",
                "raise it, or the job may be killed while it saves its last checkpoint",
            )

    @abstractmethod
    def submit(self, job: Job) -> Submission:
        """Submit the job.

        Raises:
            SchedulerError: If the scheduler is not found, does not answer, or refuses the job.
        """

    @abstractmethod
    def unfinished_state(self, job: SubmittedJob, config: SubmitConfig) -> str | None:
        """Return the state of a submitted job, such as PENDING, or None if it has ended.

        Args:
            job: The job, as recorded in the run folder, which may be untrusted.
            config: The user's settings.

        Raises:
            SchedulerError: If the scheduler does not answer, so that the state is unknown.
        """

    @abstractmethod
    def describe(self, job: SubmittedJob, config: SubmitConfig) -> str:
        """Describe a submitted job in one line, followed by a line that says where its log is.

        Args:
            job: The job, as recorded in the run folder, which may be untrusted.
            config: The user's settings.

        Raises:
            SchedulerError: If the scheduler does not answer.
        """

    def hand_over(self, job: Job) -> list[str]:
        """Submit the job and record it in the run folder."""
        submission = self.submit(job)
        record_job(
            SubmittedJob(
                run_dir=job.run_dir,
                scheduler=job.config.scheduler,
                id=submission.id,
                submitted=time.time(),
                command=job.command,
                details=submission.details,
            )
        )
        status = shlex.join(["stage=status", f"name={job.name}", *submission.status_options])
        return [
            f"submit: job {submission.title}",
            f"follow it with: python launch.py {status}; {submission.follow}",
        ]


def check_no_unfinished_job(run_dir: Path, config: SubmitConfig) -> None:
    """Check that the run's newest job has ended.

    Raises:
        RunDirError: If the job has not ended. The error says how to follow or end the job.
        SchedulerError: If the job's scheduler does not answer.
        ConfigError: If the job's backend is not installed.
    """
    jobs = submitted_jobs(run_dir)
    if not jobs:
        return
    backend = _backend_of(jobs[-1])
    state = backend.unfinished_state(jobs[-1], config)
    if state is not None:
        raise RunDirError(
            f"{run_dir} already has job {jobs[-1].id} ({state}); follow it with stage=status, or "
            f"end it with {backend.end_command}"
        )


def describe_newest_job(run_dir: Path, config: SubmitConfig) -> str | None:
    """Describe the run's newest job in one or two lines. Return None if no job was submitted."""
    jobs = submitted_jobs(run_dir)
    if not jobs:
        return None
    try:
        return _backend_of(jobs[-1]).describe(jobs[-1], config)
    except FoundryError as error:  # the rest of the run's status is still useful
        return f"{jobs[-1].id}: {error}"


def _backend_of(job: SubmittedJob) -> TrackedBackend:
    """Return the backend that submitted the job.

    Raises:
        ConfigError: If the backend is not installed here, or does not submit jobs.
    """
    key = f"{job.run_dir / FOLDER / JOBS}: scheduler"
    BACKENDS.check(job.scheduler, key)
    backend = BACKENDS[job.scheduler]
    if not isinstance(backend, TrackedBackend):
        raise ConfigError(key, job.scheduler, "a backend that submits jobs")
    return backend
