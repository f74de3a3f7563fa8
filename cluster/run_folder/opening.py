"""Open a run's folder for a driver: create it, lock it, and save or compare its config."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from cluster.run_folder.errors import RunDirError
from cluster.run_folder.files import (
    CHECKPOINTS,
    CONFIG,
    DRIVER_LOCK,
    ENVIRONMENT,
    LOGS,
    has_results,
)
from cluster.run_folder.lock import driver_lock
from cluster.run_folder.saved_config import forbidden_changes, save_config, saved_config
from cluster.run_folder.starts import record_start
from conf.schema.run import RunConfig
from foundation.atomic_files import naming
from foundation.errors import EXIT_BAD_INPUT, FoundryError


@contextmanager
def open_run(
    config: RunConfig, read_only: bool = False, must_exist: bool = False
) -> Iterator[Path]:
    """Create the run's folder if needed, and lock it for this driver while the block runs.

    The kernel holds the lock (`flock`), so it is released even if the driver is killed. If this
    call created the folder and the block ends because of wrong input or an OSError, before anything
    was logged or computed, the folder is removed.

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
    missing = [folder for folder in (run_dir, *run_dir.parents) if not folder.exists()]
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / LOGS).mkdir(exist_ok=True)
    except OSError as error:
        raise RunDirError(
            f"runs_dir={config.runs_dir}: expected a writable folder ({error})"
        ) from error
    with driver_lock(run_dir):
        try:
            with naming(run_dir):
                _agree_on_config(config, run_dir)
                record_start(run_dir)
            yield run_dir
        except (FoundryError, OSError) as error:
            if getattr(error, "exit_code", EXIT_BAD_INPUT) == EXIT_BAD_INPUT:
                _remove_untouched(run_dir, missing)
            raise


def _remove_untouched(run_dir: Path, created: list[Path]) -> None:
    """Remove the folders that this driver created, if they hold only the files of a start."""
    if run_dir not in created:
        return
    found = {path.name for path in run_dir.iterdir()}
    if found - {CONFIG, ENVIRONMENT, LOGS, DRIVER_LOCK} or any((run_dir / LOGS).iterdir()):
        return
    shutil.rmtree(run_dir)
    with contextlib.suppress(OSError):  # not empty any more
        for folder in created[1:]:
            folder.rmdir()


def announce_extension(config: RunConfig, run_dir: Path) -> None:
    """Print what a new `train.tokens` does to the learning rate of a run with checkpoints.

    All other settings are those that the run was started with, as when it goes on.

    Raises:
        RunDirError: If the run was already trained on more tokens.
    """
    saved = saved_config(run_dir)
    if saved is None:
        return
    config = replace(saved, train=replace(saved.train, tokens=config.train.tokens))
    if config.train.n_steps == saved.train.n_steps:
        return
    from rich import print as show

    from sae_core.checkpoint.folder import list_checkpoints, step_of
    from sae_core.engine.lr_schedule import lr_at

    newest = next(iter(list_checkpoints(run_dir / CHECKPOINTS)), None)
    if newest is None:
        return
    trained = step_of(newest) * config.train.batch_tokens
    if config.train.n_steps < step_of(newest):
        raise RunDirError(
            f"train.tokens={config.train.tokens}: expected at least {trained}, the tokens that "
            f"{run_dir} was already trained on; use another name=... for a shorter run"
        )
    before, now = (
        lr_at(one.optim, one.sae.n_latents, trained, one.train.tokens) for one in (saved, config)
    )
    show(
        f"train: train.tokens changes from {saved.train.tokens:,} to {config.train.tokens:,}; the "
        f"schedule now ends there, so that the learning rate after {trained:,} tokens becomes "
        f"{now:.3g} instead of {before:.3g}"
    )


def _agree_on_config(config: RunConfig, run_dir: Path) -> None:
    """Save the config, unless the run already has results from a different config.

    Raises:
        RunDirError: If the run has results from a different config. The error lists the
            differences.
    """
    path = run_dir / CONFIG
    saved = saved_config(run_dir)
    if saved is not None and has_results(run_dir):
        changes = forbidden_changes(saved, config)
        if changes:
            diff = "".join(f"\n  {key}: {old!r} -> {new!r}" for key, (old, new) in changes.items())
            raise RunDirError(
                f"{run_dir} was started with another config:{diff}\n"
                "use another name=..., restore the values, or delete the folder"
            )
        announce_extension(config, run_dir)
    # Write to a temporary file and rename it, so that a reader never sees a partial config.
    temporary = path.with_suffix(".yaml.tmp")
    save_config(config, temporary)
    os.replace(temporary, path)
