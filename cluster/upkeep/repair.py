"""Repair stage: remove uncommitted and damaged data from the stores. List the items to redo."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from activation_store import repair_store
from conf.schema.run import RunConfig


def run(config: RunConfig, run_dir: Path) -> None:
    """Repair all stores of the run.

    The next harvest rewrites the items that are missing from `store.path`. It does not write to the
    stores of a mixture.

    Raises:
        StoreBusyError: If a writer or another repair holds the lock of a store.
        StoreError: If the header of a store is damaged.
    """
    console = Console(soft_wrap=True)
    for path in config.store.paths:
        report = repair_store(path)
        console.print(f"repair: {path}: {report}")
        if report.redo and path == config.store.path:
            console.print(
                f"repair: to write these items again, run stage=harvest name={config.name}"
            )
