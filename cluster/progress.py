"""One line that lives on a terminal, and plain lines every few seconds where there is none."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Protocol

from rich.console import Console
from rich.live import Live
from rich.text import Text


class Progress(Protocol):
    """Shows how far trainer ranks have come, while a block runs that follows one group of them."""

    def __enter__(self) -> None: ...

    def show(self) -> None:
        """Called twice a second."""
        ...

    def __exit__(self, *_: object) -> None: ...


class ProgressLine:
    """A context manager whose `show(text)` may be called as often as one likes.

    Args:
        console: where; a terminal has one live line, lines printed beside it stand above.
        plain_every_s: seconds between plain lines.
        live: False prints plain lines on a terminal too.
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
        """Replaces the line on a terminal; elsewhere prints it if the last one is old enough."""
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
    """`75.2` becomes `1:15`, `4000` becomes `1:06:40`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
