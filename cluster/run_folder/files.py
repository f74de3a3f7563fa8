"""Names of the files and folders in a run's folder, each defined once.

Every name is a path relative to the run's folder: `run_dir / METRICS`. The names of files inside a
checkpoint are in `sae_core.checkpoint.folder`, and the names for submitted jobs are in
`submitted_jobs`. The names of files inside a store, `fit/` and `export/` are in the modules that
write those files.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from conf.schema.run import RunConfig
from sae_core.config import CHECKPOINTS

__all__ = ["CHECKPOINTS"]

CONFIG = "config.yaml"
"""The resolved config of the run."""
ENVIRONMENT = "env.json"
"""Hardware, package versions, commit and command of the last start, and the commands of all."""
STORE = "store"
"""The activation store, unless `store.path` is set."""
HARVEST = "harvest.json"
"""Summary of the harvest."""
METRICS = "metrics.jsonl"
"""The metric rows that `Trainer` reports; see `metrics_log`."""
COSTS = "train.json"
"""`Trainer.costs` of the last session."""
PREFILTER = "prefilter.json"
"""`PrefilterChoice` of the last start, if `train.prefilter=auto` had a choice."""
INPUTS = "inputs.json"
"""How the channels of the calibration sample differ (`InputReport`), and the proposed transform."""
WANDB_ID = "wandb_id"
"""Id under which wandb continues the run."""
SWEEP_RECORD = "sweep.json"
"""In a sweep cell's folder: why the cell ended before its last step; see `sweep_record`."""
EVALUATION = "eval/metrics.json"
"""The evaluation metrics with their definitions."""
FREQUENCY = "eval/frequency.json"
"""How often each latent fires on the stored rows."""
EXPORT = "export"
"""The SAE in the formats of other libraries, with a model card."""
REPORT = "report/index.html"
"""The HTML report on the run."""
FIT = "fit"
"""In a sweep's folder: the fitted scaling laws."""
RESHARDED = "resharded"
"""Checkpoints written by `stage=reshard`."""
LOGS = "logs"
"""Logs and heartbeats of ranks and workers."""
HARVEST_STARTS = "logs/harvest-starts"
"""Folder with one file per start of a harvest worker."""
DRIVER_LOCK = "driver.lock"
"""Lock held by the driver of the run."""
RANKS_LOCK = "ranks.lock"
"""Lock shared by all trainer ranks of the run."""
TRAINER_LOCK = "trainer.lock"
"""Lock held by rank 0 of the group that trains the run."""
STOP_REQUEST = "stop.request"
"""File through which the driver asks the trainer ranks to save a checkpoint and stop."""


def rank_log(run_dir: Path, rank: int) -> Path:
    """Return the path of a trainer rank's log."""
    return run_dir / LOGS / f"rank-{rank}.log"


def rank_heartbeat(run_dir: Path, rank: int) -> Path:
    """Return the path of a trainer rank's heartbeat."""
    return run_dir / LOGS / f"rank-{rank}.heartbeat"


def store_path(config: RunConfig, run_dir: Path) -> str:
    """Return `store.path` or, if it is not set, `store/` in the run folder."""
    return config.store.path or str(run_dir / STORE)


def consumer_name(config: RunConfig, run_dir: Path) -> str:
    """Return a run's name as a consumer of its store.

    The name includes a hash of the run folder's path, because run names are unique only within one
    parent folder.
    """
    return f"{config.name}-{hashlib.sha256(str(run_dir.resolve()).encode()).hexdigest()[:8]}"


def has_results(run_dir: Path) -> bool:
    """Return True if the run has results that depend on its config."""
    return any((run_dir / name).exists() for name in (METRICS, HARVEST, CHECKPOINTS, STORE))
