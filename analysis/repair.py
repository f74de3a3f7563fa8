"""The repair stage: drops what is not committed or is damaged, and says what to redo."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from activation_store import repair_store
from cluster.run_dir import saved_config
from conf.schema import RunConfig


def run(config: RunConfig, run_dir: Path) -> None:
    """Repairs the run's store; the next harvest writes the items that are missing then.

    Raises:
        StoreBusyError: A writer or another repair holds the store.
        StoreError: The store's own header is damaged.
    """
    console = Console(soft_wrap=True)
    config = saved_config(run_dir) or config
    report = repair_store(config.store.path)
    console.print(f"repair: {config.store.path}: {report}")
    if report.redo:
        console.print(f"repair: next, stage=harvest name={config.name} writes them again")
