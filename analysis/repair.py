"""The repair stage: drops what is not committed or is damaged, and says what to redo."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from activation_store import repair_store
from cluster.run_dir import saved_config
from conf.schema import RunConfig


def run(config: RunConfig, run_dir: Path) -> None:
    """Repairs the run's stores; the next harvest writes the items that are missing in its own.

    Raises:
        StoreBusyError: A writer or another repair holds the store.
        StoreError: The store's own header is damaged.
    """
    console = Console(soft_wrap=True)
    config = saved_config(run_dir) or config
    for path in config.store.paths:
        report = repair_store(path)
        console.print(f"repair: {path}: {report}")
        if report.redo and path == config.store.path:
            console.print(f"repair: next, stage=harvest name={config.name} writes them again")
