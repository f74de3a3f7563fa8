"""Sinks for rank 0's metrics: always `metrics.jsonl`, and optionally wandb and the console."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

from rich.console import Console

from cluster.run_folder.files import WANDB_ID
from cluster.run_folder.metrics_log import MetricsWriter
from cluster.training.progress_line import TrainingLine
from conf.schema.run import RunConfig

_WANDB_TIMEOUT_S = 30.0
"""Time limit for starting and for finishing wandb. Rows not sent by then stay in the run's
folder."""


class MetricSinks:
    """Writer of metric rows. A disk failure stops training, but a wandb failure does not.

    Args:
        config: Config of the run, with its name and logging settings.
        run_dir: The run's folder.
        console: Whether to print a progress line as well.
    """

    def __init__(self, config: RunConfig, run_dir: Path, console: bool) -> None:
        self._log = MetricsWriter(run_dir)
        self._wandb = _start_wandb(config, run_dir)
        self._line = TrainingLine(config.train.n_steps, Console()) if console else None

    def write(self, row: dict[str, Any]) -> None:
        """Append one row to `metrics.jsonl`, and pass it to wandb and the console."""
        clean = self._log.write(row)
        self._tell_wandb(
            lambda run: run.log({f"{row['sae']}/{k}": v for k, v in row.items() if k != "sae"})
        )
        if self._line is not None:
            self._line.show(clean)

    def close(self) -> None:
        """Close all sinks."""
        self._log.close()
        self._tell_wandb(lambda run: run.finish())
        if self._line is not None:
            self._line.close()

    def _tell_wandb(self, action: Callable[[Any], object]) -> None:
        if self._wandb is None:
            return
        try:
            action(self._wandb)
        except Exception as error:  # a network failure or a wandb bug must not stop training
            print(f"wandb is off: {type(error).__name__}: {error}", file=sys.stderr)
            self._wandb = None


def _start_wandb(config: RunConfig, run_dir: Path) -> Any:
    """Start a wandb run, or continue the wandb run whose id is in the run's folder.

    Returns None if wandb is disabled or fails to start.
    """
    mode: Any = config.logging.wandb
    if mode == "auto":
        mode = "online" if os.environ.get("WANDB_API_KEY") else "offline"
    if mode == "disabled":
        return None
    os.environ.setdefault("WANDB_SILENT", "true")
    try:
        import wandb

        id_file = run_dir / WANDB_ID
        if not id_file.exists():
            id_file.write_text(uuid4().hex[:8])
        return wandb.init(
            project=config.logging.wandb_project,
            name=config.name,
            id=id_file.read_text(),
            resume="allow",
            reinit="create_new",  # one process has a wandb run for each cell of a sweep
            dir=run_dir,
            mode=mode,
            settings=wandb.Settings(
                init_timeout=_WANDB_TIMEOUT_S,
                # By default, `finish` waits without limit if the network is down.
                finish_timeout=_WANDB_TIMEOUT_S,
                console="off",
                disable_git=True,
            ),
        )
    except Exception as error:  # a network failure or a wandb bug must not stop training
        print(f"wandb is off: {type(error).__name__}: {error}", file=sys.stderr)
        return None
