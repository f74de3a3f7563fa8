"""Progress displays: a live line on a terminal, or plain lines every few seconds elsewhere."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Protocol

from rich.console import Console
from rich.live import Live
from rich.text import Text


class Progress(Protocol):
    """A context manager that shows the progress of one group of trainer ranks."""

    def __enter__(self) -> None: ...

    def show(self) -> None:
        """Update the display. Called twice a second."""
        ...

    def __exit__(self, *_: object) -> None: ...


class ProgressLine:
    """A context manager that shows a changing line of text.

    `show` may be called at any rate. The last text is always shown.

    Args:
        console: Console on which the line is shown. On a terminal, other lines printed to this
            console appear above it. If None, a new console on standard output.
        plain_every_s: Seconds between plain lines.
        live: Whether to show a live line on a terminal. If False, plain lines are printed there
            too.
    """

    def __init__(
        self, console: Console | None = None, plain_every_s: float = 5.0, live: bool = True
    ) -> None:
        self.console = console or Console()
        self._plain_every_s = plain_every_s
        self._last_plain = float("-inf")
        self._pending: str | None = None
        self._live = Live(console=self.console) if live and self.console.is_terminal else None

    def __enter__(self) -> ProgressLine:
        if self._live:
            self._live.start()
        return self

    def show(self, text: str) -> None:
        """Replace the line on a terminal. Elsewhere, print it if the last line is old enough."""
        if self._live:
            self._live.update(Text(text))
        elif time.monotonic() - self._last_plain >= self._plain_every_s:
            self._print(text)
        else:
            self._pending = text

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live:
            self._live.stop()
        elif self._pending:
            self._print(self._pending)

    def _print(self, text: str) -> None:
        self.console.print(Text(text), soft_wrap=True)
        self._last_plain = time.monotonic()
        self._pending = None


def duration(seconds: float) -> str:
    """Format seconds as minutes and hours, for example `75.2` as `1:15` and `4000` as `1:06:40`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
