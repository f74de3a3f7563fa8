"""The record of a run's submitted jobs, kept in the run folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foundation.atomic_files import read_json, write_json

FOLDER = "submit"
"""Subfolder of the run folder with the job files and the jobs' ids, attempts and logs."""
JOBS = "jobs.json"
_KEYS = ("scheduler", "job", "submitted", "command")


@dataclass(frozen=True)
class SubmittedJob:
    """One job of a run, as recorded when it was submitted."""

    run_dir: Path
    """Folder of the run."""
    scheduler: str
    """Name of the job's backend."""
    id: str
    """Id of the job in its scheduler."""
    submitted: float
    """Unix time, in seconds."""
    command: list[str]
    """Command that the job runs."""
    details: dict[str, str]
    """Values that the backend needs to find the job or its log, such as `log` or `address`."""


def submitted_jobs(run_dir: Path) -> list[SubmittedJob]:
    """Return the jobs of this run, oldest first."""
    return [_job(run_dir, row) for row in _rows(run_dir)]


def record_job(job: SubmittedJob) -> None:
    """Append a job to its run's record."""
    row = {
        "scheduler": job.scheduler,
        "job": job.id,
        "submitted": job.submitted,
        "command": job.command,
    }
    write_json(job.run_dir / FOLDER / JOBS, [*_rows(job.run_dir), row | job.details])


def _rows(run_dir: Path) -> list[dict[str, Any]]:
    path = run_dir / FOLDER / JOBS
    return list(read_json(path)) if path.exists() else []


def _job(run_dir: Path, row: dict[str, Any]) -> SubmittedJob:
    return SubmittedJob(
        run_dir=run_dir,
        scheduler=row.get("scheduler", "slurm"),  # older rows lack this key and are all from Slurm
        id=row["job"],
        submitted=row.get("submitted", 0.0),
        command=row.get("command", []),
        details={key: value for key, value in row.items() if key not in _KEYS},
    )
