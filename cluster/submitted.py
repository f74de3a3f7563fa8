"""What `stage=submit` leaves in a run's folder: the jobs that were submitted, oldest first."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

from sae_core.atomic import read_json, write_json

FOLDER = "submit"
"""In the run's folder: what was submitted, the jobs' ids, their attempts and logs."""
JOBS = "jobs.json"


def submitted_jobs(run_dir: Path) -> list[dict[str, Any]]:
    """A row for each job of this run, oldest first: scheduler, job, submitted, command, log."""
    path = run_dir / FOLDER / JOBS
    return list(read_json(path)) if path.exists() else []


def record_job(run_dir: Path, scheduler: str, job: str, command: list[str], **more: Any) -> None:
    """Appends a row.

    Args:
        run_dir: the run's folder.
        scheduler: slurm or ray.
        job: its id there.
        command: what it runs.
        more: what is needed to find the job or its log again.
    """
    row = {"scheduler": scheduler, "job": job, "submitted": time.time(), "command": command}
    write_json(run_dir / FOLDER / JOBS, [*submitted_jobs(run_dir), row | more])


def dns_name(name: str) -> str:
    """The name of a run in lower case letters, digits and dashes, a letter first."""
    short = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return short if short[:1].isalpha() else f"run-{short}".strip("-")
