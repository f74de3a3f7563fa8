"""The record of a run's submitted jobs, kept in the run folder."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

from foundation.atomic_files import read_json, write_json

FOLDER = "submit"
"""Subfolder of the run folder with the job files, the jobs' ids, their attempts and logs."""
JOBS = "jobs.json"


def submitted_jobs(run_dir: Path) -> list[dict[str, Any]]:
    """Return a row for each job of this run, oldest first.

    The keys are scheduler, job, submitted (Unix time), command, and log (Slurm) or address (Ray).
    """
    path = run_dir / FOLDER / JOBS
    return list(read_json(path)) if path.exists() else []


def record_job(run_dir: Path, scheduler: str, job: str, command: list[str], **more: Any) -> None:
    """Append a row to the run's record of jobs.

    Args:
        run_dir: Folder of the run.
        scheduler: slurm or ray.
        job: Id of the job in its scheduler.
        command: Command that the job runs.
        more: Further keys that are needed to find the job or its log.
    """
    row = {"scheduler": scheduler, "job": job, "submitted": time.time(), "command": command}
    write_json(run_dir / FOLDER / JOBS, [*submitted_jobs(run_dir), row | more])


def dns_name(name: str) -> str:
    """Convert a run's name to lower-case letters, digits and dashes, with a letter first."""
    short = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return short if short[:1].isalpha() else f"run-{short}".strip("-")
