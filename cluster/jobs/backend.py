"""The interface of a job backend: a scheduler, cloud or cluster that executes a run as a job.

To add a backend, subclass `JobBackend` or one of the two base classes derived from it:
`cluster.jobs.tracked.TrackedBackend` submits jobs and queries their state, and
`cluster.jobs.job_file.JobFileBackend` writes a file that a person submits. Then register an
instance in `BACKENDS`, or declare it as an entry point in the group `latent_foundry.job_backends`,
and choose it with `submit.scheduler=NAME`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from cluster.run_folder.submitted_jobs import FOLDER
from conf.schema.submit import SubmitConfig
from foundation.registry import Registry


class Place(Enum):
    """The folders of the submitting machine that a job sees; they decide its command's paths."""

    SAME_FOLDER = "same folder"
    """The job sees all folders and starts in the folder where the command was typed."""
    OTHER_FOLDER = "other folder"
    """The job sees all folders but starts in a copy of the code, so its paths must be absolute."""
    CONTAINER = "container"
    """The job sees no folder. The run folder is on a volume mounted at `submit.mount`."""


@dataclass(frozen=True)
class Job:
    """A job to hand to a backend."""

    name: str
    """Name of the run."""
    run_dir: Path
    """Folder of the run on this machine."""
    command: list[str]
    """Command that starts the driver. Its paths are those that the job sees."""
    config: SubmitConfig
    """Settings of the job, already checked by the backend."""
    grace_s: float
    """Seconds that the run may take for its last checkpoint (`checkpoint.grace_s`)."""

    @property
    def folder(self) -> Path:
        """Folder for the files of the job. It already exists."""
        return self.run_dir / FOLDER


class JobBackend(ABC):
    """One way to run a job. Backends keep no state: `submit.*` holds all settings of a job."""

    @abstractmethod
    def check(self, config: SubmitConfig, grace_s: float) -> None:
        """Check the settings that this backend uses. Called before any work or heavy import.

        `SubmitConfig.validate` has already made the checks that all backends share.

        Args:
            config: Settings of the job.
            grace_s: Seconds that the run may take for its last checkpoint (`checkpoint.grace_s`).

        Raises:
            ConfigError: If a setting is missing, invalid or not supported. The error names the
                setting.
        """

    @abstractmethod
    def place(self, config: SubmitConfig) -> Place:
        """Return which folders of this machine the job sees."""

    @abstractmethod
    def joins_ray(self, config: SubmitConfig) -> bool:
        """Return True if the driver joins a Ray cluster that is running when the driver starts."""

    @abstractmethod
    def hand_over(self, job: Job) -> list[str]:
        """Submit the job, or write a file for it into `job.folder`.

        Returns:
            Lines for the user: what was done, and which command to use next.

        Raises:
            SchedulerError: If the scheduler is not found, does not answer, or refuses the job.
        """


BACKENDS: Registry[JobBackend] = Registry(
    "job backend",
    "submit.scheduler",
    "job_backends",
    {
        "slurm": "cluster.jobs.slurm.backend:SLURM",
        "ray": "cluster.jobs.ray_jobs:RAY_JOBS",
        "kuberay": "cluster.jobs.kuberay:KUBERAY",
        "skypilot": "cluster.jobs.skypilot:SKYPILOT",
    },
)
