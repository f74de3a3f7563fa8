"""The training progress line: from metric rows to one line of text."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from cluster.progress import ProgressLine, duration


class TrainingLine:
    """Shows the newest metrics row; one live line on a terminal, plain lines elsewhere.

    Args:
        n_steps: optimiser steps of the whole run.
        console: where.
    """

    def __init__(self, n_steps: int, console: Console) -> None:
        self._n_steps = n_steps
        self._line = ProgressLine(console)
        self._line.__enter__()

    def show(self, row: dict[str, Any]) -> None:
        """Renders a row as `Trainer` reports it."""
        self._line.show(render(row, self._n_steps))

    def close(self) -> None:
        """Ends the line."""
        self._line.__exit__(None, None, None)


def render(row: dict[str, Any], n_steps: int) -> str:
    """`train 300/683 44% · 21,034 tokens/s · FVU 0.2031 · L0 31.9 · dead 0.1% · … · ETA 0:41`."""
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


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"
