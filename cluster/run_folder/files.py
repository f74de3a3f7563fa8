"""Names of the files in a run's folder, each defined once."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from conf.schema.run import RunConfig

from conf.schema.run import RunConfig

CONFIG, ENVIRONMENT = "config.yaml", "env.json"
COSTS = "train.json"
"""File in the run's folder with `Trainer.costs` of the last session."""
METRICS = "metrics.jsonl"
"""File in the run's folder with the metric rows that `Trainer` reports."""


def store_path(config: RunConfig, run_dir: Path) -> str:
    """Return `store.path`, or `store/` in the run folder if it is not set."""
    return config.store.path or str(run_dir / "store")


def consumer_name(config: RunConfig, run_dir: Path) -> str:
    """Return a run's name as a consumer of its store.

    It includes a hash of the run folder, as run names are unique only within one parent folder.
    """
    return f"{config.name}-{hashlib.sha256(str(run_dir.resolve()).encode()).hexdigest()[:8]}"
