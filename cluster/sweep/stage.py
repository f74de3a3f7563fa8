"""The sweep stage: train a grid of SAEs on one store, several at once from each row stream.

A cell of the grid is an ordinary run with the folder `<sweep>/<cell>/`. Training it alone with
`stage=train` gives bit-identical weights, and evaluate, export, status and fit work on it.
Finished cells are skipped. If a cell fails, the reason is written to its folder (`sweep_record.py`)
and the other cells continue.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from cluster.errors import RankFailedError, SweepFailedError
from cluster.ray_session import ray_session
from cluster.run_folder.files import SWEEP_RECORD
from cluster.run_folder.lock import wait_for_old_ranks
from cluster.run_folder.opening import open_run
from cluster.run_folder.sweep_record import FAILED, clear_failure, read_record, write_record
from cluster.sweep.table import DONE, SweepTable
from cluster.training.stage import finished
from cluster.training.store_checks import check_store, warn_about_rows
from cluster.training.supervisor import train_ranks
from conf.schema.run import RunConfig
from conf.sweep_cells import cells_of


def run(config: RunConfig, run_dir: Path) -> None:
    """Train every cell of the grid that is not finished yet.

    Raises:
        ConfigError: If the store is missing, or a cell's config is invalid or does not fit the
            store.
        RunDirError: If a cell was started with another config or is being trained now.
        PreemptedError: If a signal stopped the sweep. All cells have saved a checkpoint.
        SweepFailedError: If some cells failed. The other cells have been trained to the end. Cells
            that were stopped because they diverged do not count as failed.
    """
    console = Console(soft_wrap=True)
    cells = cells_of(config, run_dir)
    _check_store(config)  # before torch is imported, which takes seconds
    with ExitStack() as stack:
        for cell in cells.values():
            # Lock the cells for the whole sweep, so that no other driver can work on them.
            stack.enter_context(open_run(cell))
        _train(config, run_dir, cells, console)


def _train(config: RunConfig, run_dir: Path, cells: dict[str, RunConfig], console: Console) -> None:
    from cluster.sweep.groups import group_size, training_groups

    wait_for_old_ranks(run_dir)
    for name in cells:
        wait_for_old_ranks(run_dir / name)
        clear_failure(run_dir / name)
    table = SweepTable(run_dir, cells, console)
    todo = {name: cell for name, cell in cells.items() if _is_open(run_dir / name, cell)}
    for name, cell in cells.items():
        if name not in todo and finished(cell, run_dir / name):
            table.set_state(name, DONE)
    groups = training_groups(todo, group_size(config, todo)) if todo else []
    console.print(
        f"sweep: {len(cells)} cells, {len(cells) - len(todo)} of them finished or stopped before, "
        f"{len(groups)} passes over the store"
    )
    if todo:
        warn_about_rows(next(iter(todo.values())), console)
        with ray_session(config.cluster, min_cpus=1):
            for names in groups:
                _train_group(run_dir, {name: cells[name] for name in names}, table)
    table.finish()
    failed = [name for name, state in table.states().items() if state == FAILED]
    if failed:
        raise SweepFailedError(
            f"{len(failed)} of {len(cells)} cells failed: {', '.join(failed)}; see "
            f"{SWEEP_RECORD} in their folders in {run_dir} for the reasons, and rerun the command "
            "to try them again"
        )


def _train_group(run_dir: Path, cells: dict[str, RunConfig], table: SweepTable) -> None:
    """Train a group of cells concurrently.

    If the ranks fail too often, unfinished cells are recorded as failed.
    """

    def still_open() -> list[str]:
        return [name for name, cell in cells.items() if _is_open(run_dir / name, cell)]

    table.begin(list(cells))
    try:
        train_ranks(next(iter(cells.values())), run_dir, table, cells=still_open)
    except RankFailedError as error:
        for name in still_open():
            write_record(run_dir / name, error)


def _is_open(run_dir: Path, cell: RunConfig) -> bool:
    return read_record(run_dir) is None and finished(cell, run_dir) is None


def _check_store(config: RunConfig) -> None:
    # A sweep makes one pass over the store per group of cells, so the store must be complete.
    check_store(replace(config, cluster=replace(config.cluster, mode="sequential")))
