"""The train stage: trainer ranks as Ray actors, all of which are restarted when one dies.

Ranks depend on one another in every step, so all of them end when one dies. New actors on a new
port then continue from the newest valid checkpoint. If the error is one that this project raises on
purpose, for example for an invalid config, the ranks are not restarted.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from cluster.run_folder.files import CHECKPOINTS
from cluster.run_folder.lock import wait_for_old_ranks
from cluster.run_folder.sweep_record import clear_record
from cluster.training.store_checks import check_store, warn_about_rows
from conf.schema.run import RunConfig


def run(
    config: RunConfig,
    run_dir: Path,
    console: Console | None = None,
    watch: Callable[[], None] = lambda: None,
) -> None:
    """Train to `train.tokens`, resuming from the newest valid checkpoint.

    Args:
        config: Config of the run.
        run_dir: The run's folder.
        console: Console on which progress is shown. If None, standard output.
        watch: Called twice a second while ranks run, and once after they have finished. If it
            raises, the ranks are stopped.

    Raises:
        ConfigError: If the store is missing, or does not fit the config.
        PlacementError: If the cluster has no room for the ranks.
        RankFailedError: If ranks died more often than `cluster.max_failures`.
        PreemptedError: If a signal stopped training. A checkpoint has been saved if possible.
    """
    console = console or Console()
    array = check_store(config)  # before torch is imported, which takes seconds
    from cluster.training.progress_line import RunProgress, training_costs
    from cluster.training.store_cursor import unregister
    from cluster.training.supervisor import train_ranks
    from sae_core.checkpoint.folder import newest_valid

    _check_start(config, run_dir, array)
    wait_for_old_ranks(run_dir)
    done = finished(config, run_dir)
    if done is not None:
        unregister(config, run_dir)
        console.print(f"train: already done, {done.name}")
        return
    warn_about_rows(config, console)
    clear_record(run_dir)
    train_ranks(config, run_dir, RunProgress(config, run_dir, console), watch)
    watch()  # once more, to handle the last position that this run has published
    unregister(config, run_dir)
    newest = newest_valid(run_dir / CHECKPOINTS, hashes=False)
    console.print(f"train: {training_costs(run_dir)}", soft_wrap=True)
    console.print(f"train: done, {newest}")


def _check_start(config: RunConfig, run_dir: Path, array: str) -> None:
    """Check before any rank starts that `train.init_from` fits, unless the run has begun.

    Raises:
        ConfigError: If it is not an SAE, or has another architecture or size.
    """
    from activation_store import open_store
    from sae_core.checkpoint.folder import list_checkpoints
    from sae_core.training.initial_weights import open_start

    path = config.train.init_from
    if path is not None and not list_checkpoints(run_dir / CHECKPOINTS):
        open_start(path, config.sae, open_store(config.store.path).arrays[array])


def finished(config: RunConfig, run_dir: Path) -> Path | None:
    """Return the valid checkpoint of the run's last step, or None if the run is not finished."""
    from sae_core.checkpoint.folder import newest_valid, read_state

    for hashes in (False, config.checkpoint.verify_hashes):
        # Verify hashes only of a checkpoint that may be the last. The ranks share the work of
        # hashing a checkpoint from which training resumes.
        newest = newest_valid(run_dir / CHECKPOINTS, hashes)
        if newest is None or read_state(newest).step < config.train.n_steps:
            return None
    return newest
