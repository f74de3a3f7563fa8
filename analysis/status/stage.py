"""Status stage: print a run's progress, read from its folder."""

from __future__ import annotations

import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from analysis.evaluation.metrics import METRICS
from cluster.jobs.tracked import describe_newest_job
from cluster.run_folder.contents import read_optional_json
from cluster.run_folder.files import CHECKPOINTS, CONFIG, EVALUATION
from cluster.run_folder.metrics_log import last_row
from cluster.run_folder.saved_config import saved_config
from cluster.run_folder.sweep_record import read_record
from cluster.training.progress_line import render
from conf.schema.run import RunConfig
from foundation.units import bytes_text
from sae_core.checkpoint.folder import list_checkpoints


def run(config: RunConfig, run_dir: Path) -> None:
    """Print a table of the run's store, training, checkpoints, evaluation, sweep cells and job."""
    table = Table(title=f"status: {config.name}", show_header=False, title_justify="left")
    table.add_column()
    table.add_column(overflow="fold")
    table.add_row("folder", str(run_dir))
    table.add_row("store", _store(config))
    table.add_row("training", _training(config, run_dir))
    names = [folder.name for folder in list_checkpoints(run_dir / CHECKPOINTS)]
    table.add_row("checkpoints", ", ".join(names) or "none")
    table.add_row("evaluation", _evaluation(run_dir))
    cells = [_cell(folder) for folder in sorted(run_dir.iterdir()) if (folder / CONFIG).exists()]
    if cells:
        table.add_row("cells", "\n".join(cells))
    job = describe_newest_job(run_dir, config.submit)
    if job is not None:
        table.add_row("job", job)
    Console().print(table)


def _cell(run_dir: Path) -> str:
    """Describe one cell of a sweep in one line."""
    record, config = read_record(run_dir), saved_config(run_dir)
    assert config is not None
    training = _training(config, run_dir)
    ended = "" if record is None else f"{record.state}, {record.reason}; "
    return f"{run_dir.name}: {ended}{training}"


def _store(config: RunConfig) -> str:
    from activation_store import lead_items, list_consumers
    from foundation.errors import FoundryError

    try:
        lines = [_size(config.store.path)]
    except FoundryError as error:
        return str(error)
    for mixed in config.store.mixture:
        try:
            size = _size(mixed.path)
        except FoundryError as error:
            size = str(error)
        weights = f"weight {mixed.weight:g} to {config.store.weight:g}"
        lines.append(f"mixed in, {weights}: {mixed.path}, {size}")
    for name, consumer in list_consumers(config.store.path).items():
        lines.append(
            f"consumer {name}: next item {consumer.next_item}, needs items from "
            f"{consumer.keep_from_item} on, last update "
            f"{time.time() - consumer.updated:.0f} s ago"
        )
    lead = lead_items(config.store.path)
    if lead is not None:
        lines.append(f"harvest is {lead} items ahead of the slowest consumer")
    return "\n".join(lines)


def _size(path: str) -> str:
    from activation_store import open_store

    store = open_store(path)
    state = "finalised" if store.finalised else "being written"
    return (
        f"{store.n_tokens:,} tokens in {store.n_items} items, {bytes_text(store.n_bytes)}, {state}"
    )


def _training(config: RunConfig, run_dir: Path) -> str:
    row = last_row(run_dir)
    return "not started" if row is None else render(row, config.train.n_steps)


def _evaluation(run_dir: Path) -> str:
    metrics = read_optional_json(run_dir / EVALUATION)
    if metrics is None:
        return "none"
    return ", ".join(
        " ".join(filter(None, (name, metric.text(metrics[name]), metric.basis(metrics))))
        for name, metric in METRICS.items()
        if metric.headline and metrics.get(name) is not None
    )
