"""Submits a run to Slurm: a batch script of our own.

Not submitit's executor: a person can read the script, change it and hand it to `sbatch`; nothing is
pickled; and it leaves the job's own process the decision what to do with a signal and with exit
code 75, which is to queue the job again under its id.
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from cluster import slurm
from cluster.submit_config import SubmitConfig
from cluster.submitted import FOLDER, record_job

SCRIPT = "job.sh"
_ROOT = Path(__file__).resolve().parents[1]


def submit(config: SubmitConfig, name: str, run_dir: Path, command: list[str]) -> tuple[str, str]:
    """The job's id, and how to follow it.

    Args:
        config: of the job.
        name: of the run.
        run_dir: its folder.
        command: what the job runs, on its first node.

    Raises:
        SchedulerError: Slurm is not there or refuses.
    """
    path = run_dir / FOLDER / SCRIPT
    path.write_text(script(config, name, run_dir, command), encoding="utf-8")
    job = slurm.call("sbatch", "--parsable", str(path)).strip().partition(";")[0]
    log = run_dir / FOLDER / f"slurm-{job}.log"
    record_job(run_dir, "slurm", job, command, log=str(log))
    return f"{job}, {path}", f"tail -f {log}"


def script(config: SubmitConfig, name: str, run_dir: Path, command: list[str]) -> str:
    """The batch script.

    Args:
        config: of the job.
        name: of the run.
        run_dir: its folder.
        command: what the job runs, on its first node.
    """
    log = str(run_dir / FOLDER / "slurm-").replace("%", "%%") + "%j.log"
    options = {
        "job-name": name,
        "output": shlex.quote(log),
        "open-mode": "append",
        # Only to the batch process: Ray's processes are not to hear of it.
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
    job = [sys.executable, "-m", "cluster.slurm_job", str(run_dir), str(config.max_requeues)]
    return "\n".join(
        [
            "#!/bin/bash",
            f"# Of `python launch.py stage=submit name={name}`.",
            *(f"#SBATCH {line}" for line in lines),
            "",
            f"cd {shlex.quote(str(Path.cwd()))} || exit 1",
            f"export PYTHONPATH={shlex.quote(str(_ROOT))}${{PYTHONPATH:+:$PYTHONPATH}}",
            "export PYTHONUNBUFFERED=1",
            *config.setup,
            f"exec {shlex.join([*job, '--', *command])}",
            "",
        ]
    )
