"""Tells the producers of a growing store how far a run has come."""

from __future__ import annotations

from pathlib import Path

from activation_store import Consumer
from cluster.source import StoreSource
from sae_core.checkpoint.folder import list_checkpoints, read_state


class RunCursor:
    """The run as a consumer of its store; held by rank 0, which tells it before every batch.

    Args:
        store: path of the store.
        name: of the run.
        source: rank 0's.
        checkpoints: folder of the run's checkpoints.
        keep_everything: training makes more than one pass, so nothing may ever be deleted.
    """

    def __init__(
        self,
        store: str,
        name: str,
        source: StoreSource,
        checkpoints: Path,
        keep_everything: bool,
    ) -> None:
        self._source, self._checkpoints = source, checkpoints
        self._keep_everything = keep_everything
        self._published: tuple[int, int] | None = None
        self._consumer = Consumer(store, name, self._kept_from())

    def publish(self) -> None:
        """Publishes the position, if it needs other items than before.

        To be called before the next batch is waited for: its window may open only once producers
        know that the ones before it are passed.
        """
        position = self._source.position
        next_item = self._source.first_item_needed(position)
        kept_from = self._kept_from()
        if (next_item, kept_from) != self._published:
            self._consumer.publish(next_item=next_item, keep_from_item=kept_from, position=position)
            self._published = (next_item, kept_from)

    def close(self) -> None:
        """The run has trained to its end."""
        self._consumer.close()

    def _kept_from(self) -> int:
        """First item that a resume from the oldest checkpoint would need."""
        found = list_checkpoints(self._checkpoints)
        if self._keep_everything or not found:
            return 0
        return self._source.first_item_needed(read_state(found[-1]).source_position)
