"""Submit a run to Slurm with a generated batch script.

submitit's executor is not used, for three reasons: a person can read the script, edit it and pass
it to `sbatch`; nothing is pickled; and the job's own process decides how to react to a signal and
to exit code 75, namely by requeueing the job under the same id.
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from cluster.jobs.slurm import commands
from cluster.run_folder.environment import ROOT
from cluster.run_folder.submitted_jobs import FOLDER, record_job
from conf.schema.submit import SubmitConfig

SCRIPT = "job.sh"


def submit(config: SubmitConfig, name: str, run_dir: Path, command: list[str]) -> tuple[str, str]:
    """Write the batch script, submit it, and record the job in the run folder.

    Args:
        config: Settings of the job.
        name: Name of the run.
        run_dir: Folder of the run.
        command: Command that the job runs on its first node.

    Returns:
        The job's id with the path of its script, and a command that follows the job's log.

    Raises:
        SchedulerError: If Slurm is not found, does not answer, or refuses the job.
    """
    path = run_dir / FOLDER / SCRIPT
    path.write_text(script(config, name, run_dir, command), encoding="utf-8")
    job = commands.call("sbatch", "--parsable", str(path)).strip().partition(";")[0]
    log = run_dir / FOLDER / f"slurm-{job}.log"
    record_job(run_dir, "slurm", job, command, log=str(log))
    return f"{job}, {path}", f"tail -f {log}"


def script(config: SubmitConfig, name: str, run_dir: Path, command: list[str]) -> str:
    """Return the text of the batch script.

    Args:
        config: Settings of the job.
        name: Name of the run.
        run_dir: Folder of the run.
        command: Command that the job runs on its first node.
    """
    log = str(run_dir / FOLDER / "slurm-").replace("%", "%%") + "%j.log"
    options = {
        "job-name": name,
        "output": shlex.quote(log),
        "open-mode": "append",
        # B: signals the batch process only, as Ray's processes must not receive the signal.
        "signal": f"B:USR1@{config.signal_lead_s}",
        "nodes": config.nodes,
        "ntasks-per-node": 1,
        "partition": config.partition,
        "account": config.account,
        "qos": config.qos,
        "gpus-per-node": config.gpus_per_node,
        "cpus-per-task": config.cpus_per_task,
        "mem": config.mem,
        "time": config.time,
    }
    lines = [f"--{key}={value}" for key, value in options.items() if value is not None]
    lines += ["--requeue" if config.max_requeues else "--no-requeue", *config.sbatch]
    job = [sys.executable, "-m", "cluster.jobs.slurm.job", str(run_dir), str(config.max_requeues)]
    return "\n".join(
        [
            "#!/bin/bash",
            f"# Written by `python launch.py stage=submit name={name}`.",
            *(f"#SBATCH {line}" for line in lines),
            "",
            f"cd {shlex.quote(str(Path.cwd()))} || exit 1",
            f"export PYTHONPATH={shlex.quote(str(ROOT))}${{PYTHONPATH:+:$PYTHONPATH}}",
            "export PYTHONUNBUFFERED=1",
            *config.setup,
            f"exec {shlex.join([*job, '--', *command])}",
            "",
        ]
    )
