"""The submit stage: a batch job that runs the same command elsewhere. Returns at once.

A script of our own rather than submitit's executor: a person can read it, change it and hand it to
`sbatch`; nothing is pickled; and it leaves the job's own process the decision what to do with a
signal and with exit code 75, which is to queue the job again under its id.
"""

from __future__ import annotations

import shlex
import sys
import time
from pathlib import Path

from rich.console import Console

from cluster import slurm
from cluster.errors import SchedulerError
from cluster.run_dir import open_run
from cluster.submit_config import SubmitConfig
from conf.schema import RunConfig
from sae_core.atomic import write_json

SCRIPT = "job.sh"
_ROOT = Path(__file__).resolve().parents[1]


def run(config: RunConfig, run_dir: Path, overrides: list[str]) -> None:
    """Submits the run as a job and prints how to follow it.

    Args:
        config: of the run.
        run_dir: its folder; `submit/` in it gets the script, the job's id and its log.
        overrides: arguments of the command line; the job repeats them with `submit.stage`.

    Raises:
        RunDirError: the run is in use, or was started with another config.
        SchedulerError: Slurm is not there or refuses, or the run has a job already.
    """
    with open_run(config):
        pass  # claimed and its config written; the lock is free again before the job can start
    earlier = slurm.unfinished_job(run_dir)
    if earlier is not None:
        raise SchedulerError(
            f"{run_dir} has job {earlier}; follow it with stage=status, or end it with scancel"
        )
    folder = run_dir / slurm.FOLDER
    folder.mkdir(exist_ok=True)
    command = [sys.executable, str(_ROOT / "launch.py"), *_for_the_job(config, overrides)]
    path = folder / SCRIPT
    path.write_text(script(config.submit, config.name, run_dir, command), encoding="utf-8")
    job = slurm.call("sbatch", "--parsable", str(path)).strip().partition(";")[0]
    log = folder / f"slurm-{job}.log"
    row = {"job": job, "submitted": time.time(), "log": str(log), "command": command}
    write_json(folder / slurm.JOBS, [*slurm.submitted_jobs(run_dir), row])
    console = Console(soft_wrap=True, highlight=False)
    console.print(f"submit: job {job}, {path}")
    console.print(f"follow: python launch.py stage=status name={config.name}; tail -f {log}")


def _for_the_job(config: RunConfig, overrides: list[str]) -> list[str]:
    mine = ("stage=", "name=", "runs_dir=")
    kept = [override for override in overrides if not override.startswith(mine)]
    runs_dir = Path(config.runs_dir).expanduser().resolve()
    return [*kept, f"stage={config.submit.stage}", f"name={config.name}", f"runs_dir={runs_dir}"]


def script(config: SubmitConfig, name: str, run_dir: Path, command: list[str]) -> str:
    """The batch script.

    Args:
        config: of the job.
        name: of the run.
        run_dir: its folder.
        command: what the job runs, on its first node.
    """
    log = str(run_dir / slurm.FOLDER / "slurm-").replace("%", "%%") + "%j.log"
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
