"""Job backends by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from cluster.errors import SchedulerError
from cluster.jobs import kuberay, ray_jobs, skypilot
from cluster.jobs.slurm import batch_script, commands
from cluster.run_folder.submitted_jobs import submitted_jobs
from conf.schema.submit import SubmitConfig

_SUBMIT = {"slurm": batch_script.submit, "ray": ray_jobs.submit}
_RENDER: dict[str, Callable[[SubmitConfig, str, list[str], float], str]] = {
    "kuberay": kuberay.render,
    "skypilot": skypilot.render,
}
_STATE = {"slurm": commands.unfinished_state, "ray": ray_jobs.unfinished_state}
_DESCRIBE = {"slurm": commands.describe, "ray": ray_jobs.describe}
_END = {"slurm": "scancel", "ray": "ray job stop"}
_FILES = {"kuberay": "rayjob.yaml", "skypilot": "skypilot.yaml"}


def unfinished_job(run_dir: Path) -> tuple[str, str] | None:
    """Return the run's newest job, such as `12 (PENDING)`, and its scheduler.

    Return None if no job was submitted or the newest one has ended.

    Raises:
        SchedulerError: If the scheduler does not answer.
    """
    jobs = submitted_jobs(run_dir)
    if not jobs:
        return None
    scheduler = _scheduler(jobs[-1])
    state = _STATE[scheduler](jobs[-1])
    return None if state is None else (f"{jobs[-1]['job']} ({state})", scheduler)


def describe_job(run_dir: Path) -> str | None:
    """Describe the run's newest job in one or two lines; return None if none was submitted."""
    jobs = submitted_jobs(run_dir)
    if not jobs:
        return None
    try:
        return _DESCRIBE[_scheduler(jobs[-1])](jobs[-1], run_dir)
    except SchedulerError as error:
        return f"{jobs[-1]['job']}: {error}"


def _scheduler(row: dict[str, Any]) -> str:
    return str(row.get("scheduler", "slurm"))  # older rows lack the key; all of those are Slurm's
