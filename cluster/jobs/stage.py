"""The submit stage: hand the run to a job backend, which runs the same command as a job.

The stage does not wait for the job.
"""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from cluster.jobs.backend import BACKENDS, Job, Place
from cluster.jobs.command import job_command
from cluster.jobs.tracked import TrackedBackend, check_no_unfinished_job
from cluster.run_folder.opening import open_run
from conf.schema.run import RunConfig


def run(config: RunConfig, run_dir: Path, overrides: list[str]) -> None:
    """Submit the run as a job, or write a job file, and print the next command to use.

    Args:
        config: Configuration of the run.
        run_dir: Folder of the run. The submitted files and the job's id are stored in its
            `submit/`.
        overrides: Arguments from the command line. The job uses the same arguments, but runs
            `submit.stage`.

    Raises:
        ConfigError: If a setting of `submit` is invalid for the backend.
        RunDirError: If the run is in use, already has a job, or was started with another config.
        SchedulerError: If the scheduler is not found, does not answer, or refuses the job.
    """
    backend = BACKENDS[config.submit.scheduler]
    backend.check(config.submit, config.checkpoint.grace_s)
    command = job_command(config, backend, overrides)
    if isinstance(backend, TrackedBackend):
        check_no_unfinished_job(run_dir, config.submit)
    if backend.place(config.submit) is not Place.CONTAINER:
        # Check and write the run folder's config, then release the folder's lock before the job can
        # start.
        with open_run(config):
            pass
    job = Job(config.name, run_dir, command, config.submit, config.checkpoint.grace_s)
    job.folder.mkdir(parents=True, exist_ok=True)
    console = Console(soft_wrap=True, highlight=False)
    for line in backend.hand_over(job):
        console.print(line)
