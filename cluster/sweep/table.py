"""Progress of a sweep's cells: a live table on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from cluster.run_folder.metrics_log import NewRows
from cluster.run_folder.sweep_record import read_record
from conf.schema.run import RunConfig

DONE, RUNNING, WAITING = "done", "running", "waiting"
_PLAIN_EVERY_S = 30.0
"""Seconds between two plain lines of a running cell."""
_COLUMNS = ("cell", "state", "step", "%", "tokens/s", "FVU", "L0", "dead")


class SweepTable:
    """A `Progress` that updates the cells in training. Other cells keep their last row.

    Args:
        run_dir: The sweep's folder.
        cells: The cells, from `cells_of`.
        console: Console to print to.
    """

    def __init__(self, run_dir: Path, cells: dict[str, RunConfig], console: Console) -> None:
        self._run_dir = run_dir
        self._console = console
        self._n_steps = {name: cell.train.n_steps for name, cell in cells.items()}
        self._states = dict.fromkeys(cells, WAITING)
        self._newest: dict[str, dict[str, Any]] = {}
        self._rows: dict[str, NewRows] = {}
        self._reasons: dict[str, str] = {}
        self._live: Live | None = None
        self._printed = 0.0
        self._look_at_records(list(cells))

    def set_state(self, name: str, state: str) -> None:
        """Set the state of a cell that is not in training."""
        self._states[name] = state

    def states(self) -> dict[str, str]:
        """Return `{cell name: state}`: done, running, waiting, stopped or failed."""
        return dict(self._states)

    def begin(self, names: list[str]) -> None:
        """Follow these cells from now on, instead of the cells given in the last call."""
        self._rows = {name: NewRows(self._run_dir / name) for name in names}
        self._states |= dict.fromkeys(names, RUNNING)

    def __enter__(self) -> None:
        self._printed = time.monotonic()
        if self._console.is_terminal:
            self._live = Live(self._table(), console=self._console, transient=True)
            self._live.start()

    def show(self) -> None:
        """Read the rows that the ranks have written since the last call, and show them."""
        before = dict(self._states)
        for name, rows in self._rows.items():
            for row in rows.read():
                self._newest[name] = row
                if row["step"] >= self._n_steps[name]:
                    self._states[name] = DONE
        self._look_at_records(list(self._rows))
        if self._live is not None:
            self._live.update(self._table())
            return
        due = time.monotonic() - self._printed >= _PLAIN_EVERY_S
        if due:
            self._printed = time.monotonic()
        states = self._states.items()
        self._print([n for n, state in states if state != before[n] or (due and state == RUNNING)])

    def __exit__(self, *_: object) -> None:
        self.show()
        if self._live is not None:
            self._live.stop()
            self._live = None

    def finish(self) -> None:
        """Print the table of all cells, and the reasons why cells failed or were stopped."""
        self._look_at_records(list(self._states))
        self._console.print(self._table())
        for name, reason in self._reasons.items():
            self._console.print(f"sweep: {name} {self._states[name]}: {reason}", soft_wrap=True)

    def _look_at_records(self, names: list[str]) -> None:
        for name in names:
            record = read_record(self._run_dir / name)
            if record is not None:
                self._states[name], self._reasons[name] = record

    def _print(self, names: list[str]) -> None:
        for name in names:
            pairs = zip(_COLUMNS[2:], self._row(name)[2:], strict=True)
            cells = [f"{key} {value}" for key, value in pairs]
            self._console.print(" · ".join([f"sweep {name} {self._states[name]}", *cells]))

    def _table(self) -> Table:
        table = Table(title="sweep", title_justify="left")
        for column in _COLUMNS:
            words = column in _COLUMNS[:2]
            table.add_column(
                column,
                justify="left" if words else "right",
                no_wrap=True,
                min_width=max(map(len, self._states)) if column == "cell" else None,
            )
        for name in self._states:
            table.add_row(*self._row(name))
        return table

    def _row(self, name: str) -> list[str]:
        row = self._newest.get(name)
        if row is None:
            return [name, self._states[name], *["–"] * (len(_COLUMNS) - 2)]
        fvu = "–" if row["fvu"] is None else f"{row['fvu']:.4g}"
        n_steps = self._n_steps[name]
        return [
            name,
            self._states[name],
            f"{row['step']}/{n_steps}",
            f"{row['step'] / n_steps:.0%}",
            f"{row['tokens_per_s']:,.0f}",
            fvu,
            f"{row['l0']:.1f}",
            f"{row['dead_fraction']:.1%}",
        ]
