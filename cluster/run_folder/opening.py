"""Open a run's folder for a driver: create it, lock it, and save or compare its config."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cluster.run_folder.environment import environment
from cluster.run_folder.errors import RunDirError
from cluster.run_folder.files import (
    CHECKPOINTS,
    CONFIG,
    ENVIRONMENT,
    HARVEST,
    LOGS,
    METRICS,
    STORE,
)
from cluster.run_folder.lock import driver_lock
from cluster.run_folder.saved_config import forbidden_changes, save_config, saved_config
from conf.schema.run import RunConfig
from foundation.atomic_files import write_json


@contextmanager
def open_run(
    config: RunConfig, read_only: bool = False, must_exist: bool = False
) -> Iterator[Path]:
    """Create the run's folder if needed, and lock it for this driver while the block runs.

    The kernel holds the lock (`flock`), so it is released even if the driver is killed.

    Args:
        config: The composed and validated config. It is written to `config.yaml` on the first call.
        read_only: Whether the stage only reads. If True, nothing is locked or written.
        must_exist: Whether the stage needs the results of an earlier stage.

    Yields:
        The run's folder.

    Raises:
        RunDirError: If another driver has the lock, the run was started with another config, the
            run must exist but does not, or its folder is not writable.
    """
    run_dir = Path(config.runs_dir).expanduser().resolve() / config.name
    if must_exist and not (run_dir / CONFIG).exists():
        raise RunDirError(f"{run_dir}: no such run; start it with name={config.name}")
    if read_only:
        yield run_dir
        return
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / LOGS).mkdir(exist_ok=True)
    except OSError as error:
        raise RunDirError(
            f"runs_dir={config.runs_dir}: expected a writable folder ({error})"
        ) from error
    with driver_lock(run_dir):
        _agree_on_config(config, run_dir)
        if not (run_dir / ENVIRONMENT).exists():
            write_json(run_dir / ENVIRONMENT, environment())
        yield run_dir


def _has_results(run_dir: Path) -> bool:
    """Return True if the run has results that depend on its config."""
    made = (METRICS, HARVEST, CHECKPOINTS, STORE)
    return any((run_dir / name).exists() for name in made)


def _agree_on_config(config: RunConfig, run_dir: Path) -> None:
    """Save the config, unless the run already has results from a different config.

    Raises:
        RunDirError: If the run has results from a different config. The error lists the
            differences.
    """
    path = run_dir / CONFIG
    saved = saved_config(run_dir)
    if saved is not None and _has_results(run_dir):
        changes = forbidden_changes(saved, config)
        if changes:
            diff = "".join(f"\n  {key}: {old!r} -> {new!r}" for key, (old, new) in changes.items())
            raise RunDirError(
                f"{run_dir} was started with another config:{diff}\n"
                "use another name=..., restore the values, or delete the folder"
            )
    # Write to a temporary file and rename it, so that a reader never sees a partial config.
    temporary = path.with_suffix(".yaml.tmp")
    save_config(config, temporary)
    os.replace(temporary, path)
