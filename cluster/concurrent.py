"""Harvest and train at once: the trainer reads what has been committed so far.

Epoch 0 visits the items in their order and opens a window when it is whole, so batches do not
depend on how fast either side is: the weights are those of harvesting first. Harvesting stops
`cluster.max_lead_items` ahead of the trainer; what the trainer and its checkpoints have passed may
be deleted. The harvest runs in a thread of the driver; its work happens in Ray workers.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import TYPE_CHECKING

from activation_store import StoreWriter, delete_consumed, lead_items, open_store, store_exists
from cluster import harvest, train
from cluster.ray_session import ray_session
from conf.schema import RunConfig

if TYPE_CHECKING:
    from cluster.harvest import HarvestJob

_POLL_S = 0.2


def run(config: RunConfig, run_dir: Path) -> None:
    """Fills the store and trains on it; returns when both are done. Raises as both stages do."""
    from rich.console import Console

    console = Console(soft_wrap=True)
    job = harvest.prepare(config, run_dir, console, live=False)
    if job is None:
        train.run(config, run_dir, console)
        return
    with ray_session(config.cluster, min_cpus=config.cluster.harvest_workers):
        background = _Harvest(job, config.cluster.max_lead_items)
        background.start()
        try:
            background.wait_for_rows()
            train.run(config, run_dir, console, watch=background.check)
            background.ends.set()
            background.join()
            background.check()
        finally:
            background.cancel()


class _Cancelled(Exception):
    """The trainer failed: nobody needs more rows now."""


class _Harvest(threading.Thread):
    """Fills the store beside the trainer, no further ahead of it than `max_lead_items`."""

    def __init__(self, job: HarvestJob, max_lead_items: int | None) -> None:
        super().__init__(name="harvest", daemon=True)
        self._job, self._max_lead_items = job, max_lead_items
        self._cancelled = threading.Event()
        self._error: BaseException | None = None
        self.ends = threading.Event()
        """Set when no consumer is left to wait for."""

    def run(self) -> None:
        """The thread's body."""
        try:
            harvest.fill(self._job, self._may_start)
        except BaseException as error:  # noqa: BLE001 - raised again in the driver's thread
            self._error = error

    def check(self) -> None:
        """Raises what ended the harvest, and deletes what is consumed if the run says so."""
        if self._error is not None:
            raise self._error
        if self._job.config.cluster.retention == "consumed":
            delete_consumed(self._job.store)

    def wait_for_rows(self) -> None:
        """Returns once the first item is committed; raises what ended the harvest before."""
        while not _has_rows(self._job.store):
            self.join(_POLL_S)
            if not self.is_alive():
                self.check()
                return

    def cancel(self) -> None:
        """Ends the harvest if it still runs; items that are committed stay."""
        self._cancelled.set()
        self.join()

    def _may_start(self, in_flight: int) -> bool:
        if self._cancelled.is_set():
            raise _Cancelled
        if self._max_lead_items is None or self.ends.is_set():
            return True
        lead = lead_items(self._job.store)
        if lead is None:
            return self._may_start_before_the_trainer(in_flight)
        return lead + in_flight < self._max_lead_items

    def _may_start_before_the_trainer(self, in_flight: int) -> bool:
        """Until the trainer has registered: as many items as it samples, or may be ahead of it."""
        assert self._max_lead_items is not None
        path, config = self._job.store, self._job.config
        if len(StoreWriter(path).committed_items()) + in_flight < self._max_lead_items:
            return True
        valid_rows, window = open_store(path).valid_rows, config.store.window_items
        in_windows = valid_rows[: len(valid_rows) // window * window].sum()
        return bool(in_windows < config.train.sample_tokens)


def _has_rows(path: str) -> bool:
    return store_exists(path) and open_store(path).n_items > 0
