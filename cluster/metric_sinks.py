"""Where rank 0's metrics go: `metrics.jsonl` always, wandb when it can, the console when asked."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO
from uuid import uuid4

from rich.console import Console

from cluster.training_line import METRICS, TrainingLine
from conf.schema import RunConfig

_WANDB_ID = "wandb_id"
_WANDB_TIMEOUT_S = 30.0
"""For its start and for its end; what is not sent by then lies in the run's folder."""


class MetricSinks:
    """Takes metric rows; nothing that fails here but the disk stops training.

    Args:
        config: run and logging.
        run_dir: the run's folder.
        console: also print a progress line.
    """

    def __init__(self, config: RunConfig, run_dir: Path, console: bool) -> None:
        self._file = _open_for_append(run_dir / METRICS)
        self._wandb = _start_wandb(config, run_dir)
        self._line = TrainingLine(config.train.n_steps, Console()) if console else None

    def write(self, row: dict[str, Any]) -> None:
        """Appends one row, whole, and shows it."""
        # JSON has no NaN or infinity; null is what a reader of another language can take.
        clean = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in row.items()
        }
        self._file.write(json.dumps(clean) + "\n")
        self._file.flush()
        self._tell_wandb(
            lambda run: run.log({f"{row['sae']}/{k}": v for k, v in row.items() if k != "sae"})
        )
        if self._line is not None:
            self._line.show(clean)

    def close(self) -> None:
        """Ends the sinks."""
        self._file.close()
        self._tell_wandb(lambda run: run.finish())
        if self._line is not None:
            self._line.close()

    def _tell_wandb(self, action: Callable[[Any], object]) -> None:
        if self._wandb is None:
            return
        try:
            action(self._wandb)
        except Exception as error:  # a dead network or a broken wandb never stops training
            print(f"wandb is off: {type(error).__name__}: {error}", file=sys.stderr)
            self._wandb = None


def _open_for_append(path: Path) -> TextIO:
    """The log, at the beginning of a line: a killed rank may have left half of one."""
    torn = path.exists() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")
    file = open(path, "a", encoding="utf-8")  # noqa: SIM115, the sinks close it
    if torn:
        file.write("\n")
    return file


def _start_wandb(config: RunConfig, run_dir: Path) -> Any:
    """A wandb run that a restarted rank continues under the same id, or None."""
    mode: Any = config.logging.wandb
    if mode == "auto":
        mode = "online" if os.environ.get("WANDB_API_KEY") else "offline"
    if mode == "disabled":
        return None
    os.environ.setdefault("WANDB_SILENT", "true")
    try:
        import wandb

        id_file = run_dir / _WANDB_ID
        if not id_file.exists():
            id_file.write_text(uuid4().hex[:8])
        return wandb.init(
            project=config.logging.wandb_project,
            name=config.name,
            id=id_file.read_text(),
            resume="allow",
            reinit="create_new",  # cells of a sweep have one each, in one process
            dir=run_dir,
            mode=mode,
            settings=wandb.Settings(
                init_timeout=_WANDB_TIMEOUT_S,
                # By default `finish` waits for a network that is gone for as long as it is gone.
                finish_timeout=_WANDB_TIMEOUT_S,
                console="off",
                disable_git=True,
            ),
        )
    except Exception as error:  # a dead network or a broken wandb never stops training
        print(f"wandb is off: {type(error).__name__}: {error}", file=sys.stderr)
        return None
