"""The training progress line, rendered from metric rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

from cluster.progress import ProgressLine, duration
from cluster.run_folder.files import COSTS
from cluster.run_folder.metrics_log import NewRows
from conf.schema.run import RunConfig
from foundation.atomic_files import read_json


class TrainingLine:
    """Display of the newest metrics row: a live line on a terminal, plain lines elsewhere.

    Args:
        n_steps: Number of optimiser steps in the whole run.
        console: Console to print to.
    """

    def __init__(self, n_steps: int, console: Console) -> None:
        self._n_steps = n_steps
        self._line = ProgressLine(console)
        self._line.__enter__()

    def show(self, row: dict[str, Any]) -> None:
        """Show a row that `Trainer` has reported."""
        self._line.show(render(row, self._n_steps))

    def close(self) -> None:
        """Stop the display."""
        self._line.__exit__(None, None, None)


class RunProgress:
    """The driver's `Progress` for a single run, which shows the newest metrics row as a line."""

    def __init__(self, config: RunConfig, run_dir: Path, console: Console) -> None:
        self._n_steps = config.train.n_steps
        self._run_dir = run_dir
        self._console = console

    def __enter__(self) -> None:
        self._rows = NewRows(self._run_dir)
        self._line = TrainingLine(self._n_steps, self._console)

    def show(self) -> None:
        """Show the rows that rank 0 has written since the last call."""
        for row in self._rows.read():
            self._line.show(row)

    def __exit__(self, *_: object) -> None:
        self._line.close()


def render(row: dict[str, Any], n_steps: int) -> str:
    """Return a row as text, for example `train 300/683 44% · 21,034 tokens/s · … · ETA 0:41`."""
    rate = row["tokens_per_s"]
    tokens_left = (n_steps - row["step"]) * row["tokens"] / max(row["step"], 1)
    parts = [
        f"train {row['step']}/{n_steps} {row['step'] / n_steps:.0%}",
        f"{rate:,.0f} tokens/s",
        f"FVU {_number(row['fvu'])}",
        f"L0 {row['l0']:.1f}",
        f"dead {row['dead_fraction']:.1%}",
        f"wait {row['loader_wait_fraction']:.0%}",
        f"mem {row['peak_memory_bytes'] / 2**30:.1f} GiB",
        f"ETA {duration(tokens_left / rate)}",
    ]
    if row.get("mfu") is not None:
        parts.insert(2, f"MFU {row['mfu']:.0%}")
    return " · ".join(parts)


def training_costs(run_dir: Path) -> str:
    """Return, as text, the cost of checkpoints in the last session.

    For example `4 checkpoints paused training for 0.31 s of 101.2 s (0.3%), written in 1.9 s`.
    """
    costs = read_json(run_dir / COSTS)
    share = costs["checkpoint_pause_s"] / max(costs["seconds"], 1e-9)
    short_s = costs.get("checkpoint_memory_wait_s", 0.0)
    short = f", of which {short_s:.2f} s for lack of host memory" if short_s >= 0.005 else ""
    return (
        f"{costs['checkpoints']} checkpoints paused training for "
        f"{costs['checkpoint_pause_s']:.2f} s of {costs['seconds']:.1f} s ({share:.1%}){short}, "
        f"written in {costs['checkpoint_writing_s']:.1f} s"
    )


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"
