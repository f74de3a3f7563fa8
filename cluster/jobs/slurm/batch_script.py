"""The batch script of a Slurm job."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from cluster.jobs.backend import Job
from cluster.run_folder.environment import ROOT


def script(job: Job) -> str:
    """Return the text of the batch script."""
    config = job.config
    folder = str(job.folder).replace("%", "%%")
    options = {
        "job-name": job.name,
        "output": shlex.quote(f"{folder}/slurm-%j.log"),  # %j: the job's id
        "open-mode": "append",
        # B: signals only the batch process, because Ray's processes must not receive the signal.
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
    body = [sys.executable, "-m", "cluster.jobs.slurm.job"]
    body += [str(job.run_dir), str(config.max_requeues), "--", *job.command]
    return "\n".join(
        [
            "#!/bin/bash",
            f"# Written by `python launch.py stage=submit name={job.name}`.",
            *(f"#SBATCH {line}" for line in lines),
            "",
            f"cd {shlex.quote(str(Path.cwd()))} || exit 1",
            f"export PYTHONPATH={shlex.quote(str(ROOT))}${{PYTHONPATH:+:$PYTHONPATH}}",
            "export PYTHONUNBUFFERED=1",
            *config.setup,
            f"exec {shlex.join(body)}",
            "",
        ]
    )
