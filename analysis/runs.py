"""Read the files of a run folder, whichever stages of the run have finished."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from activation_store.errors import StoreError
from analysis.errors import RunFileError
from analysis.export.source import shareable
from cluster.config import DataConfig, ModelConfig
from conf.schema import RunConfig
from sae_core.atomic import read_json
from sae_core.checkpoint.folder import MANIFEST, list_checkpoints

METRIC_NAMES = (
    "fvu",
    "mse",
    "l0",
    "dead_fraction",
    "ce_clean",
    "ce_recon",
    "ce_zero",
    "ce_mean",
    "ce_recovered",
    "ce_recovered_mean",
    "kl",
    "tokens",
)
"""Keys of eval/metrics.json, in the order in which pages and cards show them."""


def as_trained(config: RunConfig) -> RunConfig:
    """Return the config with the model and text replaced by what the store's rows came from.

    Users who train on their own activations leave the config's model at its default. Exports and
    reports must not name that model, so both become "unknown" unless the provenance of every store
    names a model and a text. With a mixture, `data.path` lists the texts of all stores.
    """
    from activation_store import open_store

    try:
        found = [open_store(path).header.provenance or {} for path in config.store.paths]
    except StoreError:
        if not config.store.mixture:
            return config  # the store was moved away after training: nothing to compare with
        found = [{}]  # a store of a mixture is missing or damaged: name no model and no text
    unknown = "unknown"
    if not all("model" in one and "dataset" in one for one in found):
        return replace(config, model=ModelConfig(path=unknown), data=DataConfig(path=unknown))
    if len({one.get("weights_sha256") for one in found}) > 1:
        config = replace(config, model=ModelConfig(path=unknown))
    if len({one.get("dataset_sha256") for one in found}) > 1:
        weights = config.store.weights
        texts = [
            f"{shareable(str(one['dataset']))} (weight {weight:g})"
            for one, weight in zip(found, weights, strict=True)
        ]
        config = replace(config, data=replace(config.data, package=None, path=", ".join(texts)))
    return config


def read_optional_json(path: Path) -> dict[str, Any] | None:
    """Read a JSON object from a file; return None if its stage has not written the file yet.

    Raises:
        RunFileError: If the file exists but does not contain a JSON object.
    """
    try:
        value = read_json(path)
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise RunFileError(
            f"{path}: expected JSON: {error}; run the stage that writes it again"
        ) from error
    if not isinstance(value, dict):
        raise RunFileError(
            f"{path}: expected a JSON object, found {type(value).__name__}; run the stage that "
            "writes it again"
        )
    return value


@dataclass(frozen=True)
class TrainingLog:
    """Contents of `metrics.jsonl`, grouped by SAE."""

    rows: dict[str, list[dict[str, Any]]]
    """SAE name -> rows in order of step, one row per logged step."""
    unreadable_lines: int
    """Number of lines that are not valid rows. A kill in the middle of a write leaves one."""

    def __bool__(self) -> bool:
        return any(self.rows.values())


def read_training_log(path: Path) -> TrainingLog:
    """Read a run's `metrics.jsonl`; the result is empty if training has not started.

    A resumed run logs the steps after its checkpoint again. The last row of each step is used.
    """
    by_sae: dict[str, dict[int, dict[str, Any]]] = defaultdict(dict)
    unreadable = 0
    if path.is_file():
        with path.open(encoding="utf-8", errors="replace") as file:
            for line in filter(str.strip, file):
                row = _row(line)
                if row is None:
                    unreadable += 1
                else:
                    # A later row of the same step replaces the earlier one.
                    by_sae[str(row.get("sae", "sae"))][row["step"]] = row
    rows = {name: [steps[step] for step in sorted(steps)] for name, steps in by_sae.items()}
    return TrainingLog(rows, unreadable)


def _row(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    whole = isinstance(row, dict) and isinstance(row.get("step"), int)
    return row if whole else None


@dataclass(frozen=True)
class CheckpointEntry:
    """One finished checkpoint folder."""

    name: str
    written: datetime
    """Modification time of the folder, in UTC."""
    bytes: int
    """Total size of the files."""
    files: int
    """Number of files."""
    has_manifest: bool


def checkpoint_entries(run_dir: Path) -> list[CheckpointEntry]:
    """List the run's checkpoints, newest first, without verifying their contents."""
    entries = []
    for folder in list_checkpoints(run_dir / "checkpoints"):
        sizes = [file.stat().st_size for file in folder.rglob("*") if file.is_file()]
        written = datetime.fromtimestamp(folder.stat().st_mtime, UTC)
        manifest = (folder / MANIFEST).is_file()
        entries.append(CheckpointEntry(folder.name, written, sum(sizes), len(sizes), manifest))
    return entries
