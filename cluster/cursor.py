"""Tells the producers of a growing store how far a run has come."""

from __future__ import annotations

import time
from pathlib import Path

from activation_store import Consumer, consumers, remove_consumer
from cluster.provenance import consumer_name
from cluster.source import StoreSource
from conf.schema import RunConfig
from sae_core.checkpoint.folder import list_checkpoints, read_state
from sae_core.errors import CheckpointError

_LOOK_EVERY_S = 1.0
"""Between two looks at the checkpoints; what is kept for too long only costs room."""


class RunCursor:
    """The run as a consumer of its store; held by rank 0, which tells it before every batch.

    Args:
        store: path of the store.
        name: of `provenance.consumer_name`.
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
        self._kept, self._look_again = self._kept_from(), 0.0
        self._consumer = Consumer(store, name, self._kept)

    def publish(self) -> None:
        """Publishes the position, if it needs other items than before.

        To be called before the next batch is waited for: its window may open only once producers
        know that the ones before it are passed.
        """
        position = self._source.position
        next_item = self._source.first_item_needed(position)
        if time.monotonic() >= self._look_again:  # a folder on a shared disk, not at every step
            self._kept, self._look_again = self._kept_from(), time.monotonic() + _LOOK_EVERY_S
        kept_from = self._kept
        if (next_item, kept_from) != self._published:
            self._consumer.publish(next_item=next_item, keep_from_item=kept_from, position=position)
            self._published = (next_item, kept_from)

    def finish(self) -> None:
        """The run has trained to its end, its checkpoints are written: publishes what they need.

        `let_go` takes the cursor away, once whoever deletes has seen it.
        """
        self._look_again = 0.0
        self.publish()

    def _kept_from(self) -> int:
        """First item that a resume from the oldest checkpoint would need."""
        if self._keep_everything:
            return 0
        for folder in reversed(list_checkpoints(self._checkpoints)):
            try:
                return self._source.first_item_needed(read_state(folder).source_position)
            except CheckpointError:
                continue  # resume passes over a damaged one, too
        return 0


def let_go(config: RunConfig, run_dir: Path) -> None:
    """A run that has trained holds nobody back, even if it was killed before it said so."""
    name = consumer_name(config, run_dir)
    if name in consumers(config.store.path):
        remove_consumer(config.store.path, name)
