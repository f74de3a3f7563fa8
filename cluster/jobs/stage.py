"""The submit stage: run the same command as a job of Slurm or Ray, or write a job file to submit.

The stage does not wait for the job.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from rich.console import Console

from cluster.errors import SchedulerError
from cluster.jobs import kuberay, skypilot
from cluster.jobs.backend import _END, _FILES, _RENDER, _SUBMIT, unfinished_job
from cluster.run_folder.environment import ROOT
from cluster.run_folder.errors import RunDirError
from cluster.run_folder.opening import open_run
from cluster.run_folder.submitted_jobs import FOLDER
from conf.schema.run import RunConfig
from conf.schema.submit import SubmitConfig


def run(config: RunConfig, run_dir: Path, overrides: list[str]) -> None:
    """Submit the run as a job, or write a job file, and print the next command to use.

    Args:
        config: Configuration of the run.
        run_dir: Folder of the run. What was submitted and the job's id are stored in its `submit/`.
        overrides: Arguments of the command line. The job uses the same ones, but runs
            `submit.stage`.

    Raises:
        RunDirError: If the run is in use, already has a job, or was started with another config.
        SchedulerError: If the scheduler is not found, does not answer, or refuses the job.
    """
    console = Console(soft_wrap=True, highlight=False)
    folder = run_dir / FOLDER
    if config.submit.scheduler in _RENDER:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / _FILES[config.submit.scheduler]
        text = _RENDER[config.submit.scheduler](
            config.submit,
            config.name,
            _command(config.submit, _arguments_in_container(config, overrides)),
            config.checkpoint.grace_s,
        )
        path.write_text(text, encoding="utf-8")
        module = kuberay if config.submit.scheduler == "kuberay" else skypilot
        console.print(f"submit: wrote {path}; nothing has been submitted yet")
        console.print(f"submit it with: {module.submit_command(config.submit, path)}")
        return
    earlier = unfinished_job(run_dir)
    if earlier is not None:
        job, scheduler = earlier
        raise RunDirError(
            f"{run_dir} already has job {job}; follow it with stage=status, or end it with "
            f"{_END[scheduler]}"
        )
    # Check and write the run folder's config, then release its lock before the job can start.
    with open_run(config):
        pass
    folder.mkdir(exist_ok=True)
    command = _command(config.submit, _arguments_on_shared_folders(config, overrides))
    job, follow = _SUBMIT[config.submit.scheduler](config.submit, config.name, run_dir, command)
    console.print(f"submit: job {job}")
    console.print(f"follow it with: python launch.py stage=status name={config.name}; {follow}")


def _command(config: SubmitConfig, arguments: list[str]) -> list[str]:
    """Return the driver's command; it joins the job's Ray cluster, except on Slurm."""
    here = [sys.executable, str(ROOT / "launch.py")]
    start = config.launch or (["python", "launch.py"] if config.working_dir else here)
    joins = config.scheduler != "slurm" and not any(
        argument.startswith("cluster=") for argument in arguments
    )
    return [*start, *(["cluster=join"] if joins else []), *arguments]


def _arguments_on_shared_folders(config: RunConfig, overrides: list[str]) -> list[str]:
    """Return the job's arguments for a job that sees this machine's folders."""
    places = {"runs_dir": str(Path(config.runs_dir).expanduser().resolve())}
    if config.submit.scheduler == "ray" and config.submit.working_dir is not None:
        # The job starts in another folder, so relative paths would not work. launch.py has already
        # made these settings absolute if they are paths.
        paths = {
            "cache_dir": config.cache_dir,
            "store.path": config.store.path,
            "data.path": config.data.path,
            "model.path": config.model.path,
        }
        places |= {key: path for key, path in paths.items() if path.startswith("/")}
        if config.store.mixture:
            entries = (
                f"{{path:{_quoted(mixed.path)},weight:{mixed.weight}}}"
                for mixed in config.store.mixture
            )
            places["store.mixture"] = f"[{','.join(entries)}]"
    kept = _without(overrides, "stage=", "name=", *(f"{key}=" for key in places))
    settings = {"stage": config.submit.stage, "name": config.name, **places}
    return [*kept, *(f"{key}={value}" for key, value in settings.items())]


def _quoted(text: str) -> str:
    """Quote a string for Hydra, which unescapes only backslashes that precede a quote."""
    escaped = re.sub(r'(\\+)(?="|$)', r"\1\1", text).replace('"', '\\"')
    return f'"{escaped}"'


def _arguments_in_container(config: RunConfig, overrides: list[str]) -> list[str]:
    """Return the job's arguments for a container, with runs and caches on the mounted volume."""
    for override in overrides:
        if override.startswith("--config-dir="):
            raise SchedulerError(
                f"{override}: expected a config that is in the image; give its values on the "
                "command line, or add its files to conf/ of the image"
            )
    kept = _without(overrides, "stage=", "name=", "runs_dir=", "cache_dir=", "submit=", "submit.")
    mount = config.submit.mount
    places = [f"runs_dir={mount}", f"cache_dir={mount}/.cache"]
    return [*kept, f"stage={config.submit.stage}", f"name={config.name}", *places]


def _without(overrides: list[str], *prefixes: str) -> list[str]:
    """Return the overrides that begin with none of the prefixes."""
    return [override for override in overrides if not override.startswith(prefixes)]
