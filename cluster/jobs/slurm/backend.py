"""The backend for Slurm: check the settings, submit the batch script, describe the job.

submitit's executor is not used, for three reasons: a person can read the script, edit it and pass
it to `sbatch`; nothing is pickled; and the job's own process handles signals and exit code 75, by
requeueing the job under the same id.
"""

from __future__ import annotations

import json
import re
from typing import ClassVar

from cluster.jobs.backend import Job, Place
from cluster.jobs.slurm import commands
from cluster.jobs.slurm.batch_script import script
from cluster.jobs.slurm.job import ATTEMPTS
from cluster.jobs.tracked import Submission, TrackedBackend
from cluster.run_folder.submitted_jobs import FOLDER, SubmittedJob
from conf.schema.submit import SubmitConfig
from foundation.errors import ConfigError

SCRIPT = "job.sh"
_TIME = re.compile(r"\d+|\d+:\d\d(:\d\d)?|\d+-\d+(:\d\d){0,2}")
_ENDED = (
    *("COMPLETED", "CANCELLED", "FAILED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "DEADLINE"),
    *("PREEMPTED", "BOOT_FAIL"),  # with PreemptMode=CANCEL a job ends as PREEMPTED
)
"""Slurm's states of a job that has ended."""


class Slurm(TrackedBackend):
    """Jobs of a Slurm cluster whose nodes share this machine's folders."""

    end_command: ClassVar[str] = "scancel"

    def check(self, config: SubmitConfig, grace_s: float) -> None:
        """Check the time limit, and that each option is a single line that can go into a script."""
        super().check(config, grace_s)
        if config.time is not None:
            _check_time(config.time, config.signal_lead_s)
        for option in config.sbatch:
            if not option.startswith("-"):
                raise ConfigError(
                    "submit.sbatch", option, "an option of sbatch, such as --exclusive"
                )
        for word in (config.partition, config.account, config.qos, config.mem, *config.sbatch):
            if word is not None and "\n" in word:
                raise ConfigError("submit", word, "a single line", "remove the line break")

    def place(self, config: SubmitConfig) -> Place:
        """Return `Place.SAME_FOLDER`."""
        return Place.SAME_FOLDER

    def joins_ray(self, config: SubmitConfig) -> bool:
        """Return False: `cluster.jobs.slurm.job` starts Ray if there are several nodes."""
        return False

    def submit(self, job: Job) -> Submission:
        """Write the batch script and submit it."""
        path = job.folder / SCRIPT
        path.write_text(script(job), encoding="utf-8")
        job_id = commands.call("sbatch", "--parsable", str(path)).strip().partition(";")[0]
        log = str(job.folder / f"slurm-{job_id}.log")
        return Submission(job_id, f"{job_id}, {path}", f"tail -f {log}", {"log": log})

    def unfinished_state(self, job: SubmittedJob, config: SubmitConfig) -> str | None:
        """Return the state of a submitted job, such as PENDING, or None if it has ended."""
        fields = commands.job_fields(job.id)
        if fields is None or fields["JobState"].startswith(_ENDED):
            return None
        return fields["JobState"]

    def describe(self, job: SubmittedJob, config: SubmitConfig) -> str:
        """Describe a submitted job in one line, followed by a line with its log file."""
        fields = commands.job_fields(job.id)
        text = _describe_from_record(job) if fields is None else _describe_known(job, fields)
        return f"{text}\nlog {job.details['log']}"


def _check_time(time: str, signal_lead_s: int) -> None:
    if not _TIME.fullmatch(time):
        raise ConfigError("submit.time", time, "a time in Slurm's format, such as 24:00:00")
    if seconds(time) <= 2 * signal_lead_s:
        raise ConfigError(
            "submit.time",
            time,
            f"more than twice submit.signal_lead_s={signal_lead_s} seconds",
            "use a longer time; otherwise every attempt is asked to stop soon after its start",
        )


def seconds(time: str) -> int:
    """Convert Slurm's time formats to seconds.

    The formats are minutes[:seconds], hours:minutes:seconds, and days-hours[:minutes[:seconds]].
    """
    days, dash, rest = time.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    first_unit_s = 3600 if dash or len(parts) == 3 else 60
    units_s = (first_unit_s, first_unit_s // 60, first_unit_s // 3600)
    return int(days or 0) * 86_400 + sum(n * unit for n, unit in zip(parts, units_s, strict=False))


def _describe_known(job: SubmittedJob, fields: dict[str, str]) -> str:
    """Describe a job from Slurm's record of it."""
    state = fields["JobState"]
    text = f"{job.id} {state}"
    if fields.get("Reason", "None") != "None":
        text += f" ({fields['Reason']})"
    if state == "RUNNING":
        text += f" on {fields['NodeList']}, {fields['RunTime']} of {fields['TimeLimit']}"
    if fields.get("Restarts", "0") != "0":
        text += f", requeued {fields['Restarts']} times"
    if state.startswith(_ENDED) and state != "COMPLETED":
        code, _, number = fields.get("ExitCode", "0:0").partition(":")
        text += f", signal {number}" if number not in ("", "0") else f", exit code {code}"
        text += "; rerun stage=submit to resume"
    return text


def _describe_from_record(job: SubmittedJob) -> str:
    """Describe a job that Slurm no longer knows, based on what the job itself recorded."""
    path = job.run_dir / FOLDER / ATTEMPTS
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    rows = [row for row in map(json.loads, lines) if row["job"] == job.id]
    if rows and rows[-1]["event"] == "end":
        code = rows[-1]["exit_code"]
        text = f"{job.id} ended with exit code {code}"
        return f"{text}; rerun stage=submit to resume" if code else text
    return (
        f"{job.id} ended without recording an exit code: it was killed (cancelled, out of memory "
        "or node lost); rerun stage=submit to resume"
    )


SLURM = Slurm()
