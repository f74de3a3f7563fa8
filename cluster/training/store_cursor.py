"""The cursor of a run: how far the run has read a growing store, published for its producers."""

from __future__ import annotations

import time
from pathlib import Path

from activation_store import Consumer, list_consumers, remove_consumer
from cluster.run_folder.files import consumer_name
from cluster.training.store_source import StoreSource
from conf.schema.run import RunConfig
from sae_core.checkpoint.folder import list_checkpoints, read_state
from sae_core.errors import CheckpointError

_LIST_EVERY_S = 1.0
"""Seconds between two listings of the checkpoints. A late listing only delays deletions."""


class RunCursor:
    """Registration of a run as a consumer of its store. Rank 0 updates it before every batch.

    Args:
        store: Path of the store.
        name: The consumer's name, from `run_folder.files.consumer_name`.
        source: Rank 0's source.
        checkpoints: Folder of the run's checkpoints.
        keep_everything: Whether to publish that all items are still needed, so that none may be
            deleted.
    """

    def __init__(
        self,
        store: str,
        name: str,
        source: StoreSource,
        checkpoints: Path,
        keep_everything: bool,
    ) -> None:
        self._source = source
        self._checkpoints = checkpoints
        self._keep_everything = keep_everything
        self._published: tuple[int, int] | None = None
        self._kept = self._first_item_kept()
        self._next_listing = 0.0
        self._consumer = Consumer(store, name, self._kept)

    def publish(self) -> None:
        """Publish the position, if it needs different items from the last published position.

        Call it before waiting for the next batch: producers may write that batch's window only once
        they know that all earlier windows have been read.
        """
        position = self._source.position
        next_item = self._source.first_item_needed(position)
        # The checkpoints may be on a shared disk, so do not list them at every step.
        if time.monotonic() >= self._next_listing:
            self._kept = self._first_item_kept()
            self._next_listing = time.monotonic() + _LIST_EVERY_S
        kept_from = self._kept
        if (next_item, kept_from) != self._published:
            self._consumer.publish(next_item=next_item, keep_from_item=kept_from, position=position)
            self._published = (next_item, kept_from)

    def finish(self) -> None:
        """Publish the final position. Call it when training has ended and checkpoints are written.

        The driver calls `unregister` later, after the last deletions.
        """
        self._next_listing = 0.0
        self.publish()

    def _first_item_kept(self) -> int:
        """Return the first item that a resume from the oldest readable checkpoint would need."""
        if self._keep_everything:
            return 0
        for folder in reversed(list_checkpoints(self._checkpoints)):
            try:
                return self._source.first_item_needed(read_state(folder).source_position)
            except CheckpointError:
                continue  # a resume skips damaged checkpoints too
        return 0


def unregister(config: RunConfig, run_dir: Path) -> None:
    """Unregister a finished run from its store, so that the run no longer blocks producers.

    This also works for a run that was killed before it published its last position.
    """
    name = consumer_name(config, run_dir)
    if name in list_consumers(config.store.path):
        remove_consumer(config.store.path, name)
