"""Concurrent mode: train on the items committed so far while the harvest continues.

Epoch 0 reads the items in order and waits until a window of items is complete. The batches
therefore do not depend on how fast either side runs, and training gives the same weights as in
sequential mode. The harvest pauses when it is `cluster.max_lead_items` ahead of the trainer. Items
that the trainer and its checkpoints no longer need may be deleted. A thread of the driver controls
the harvest; Ray workers compute it.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import TYPE_CHECKING

from activation_store import delete_consumed, list_consumers, open_store, store_exists
from activation_store.errors import MissingDataError
from cluster.errors import PlacementError
from cluster.harvest import stage as harvest_stage
from cluster.ray_session import ray_session
from cluster.training import stage as training_stage
from conf.schema.run import RunConfig
from foundation.errors import ConfigError

if TYPE_CHECKING:
    from cluster.harvest.stage import HarvestJob

_POLL_S = 0.2


def run(config: RunConfig, run_dir: Path) -> None:
    """Fill the store and train on it concurrently. Return when both are finished.

    Errors from `cluster.harvest.stage.run` and `cluster.training.stage.run` propagate too.

    Raises:
        ConfigError: If consumed rows are to be deleted, but training needs more than one pass.
        PlacementError: If harvest workers and ranks together need more GPUs than the cluster has.
    """
    from rich.console import Console

    console = Console(soft_wrap=True)
    job = harvest_stage.prepare(config, run_dir, console, live=False)
    if job is None:
        training_stage.run(config, run_dir, console)
        return
    _check_one_pass(config, job)
    if job.resuming:
        job.harvest_lock.acquire()  # fail before Ray and the ranks are started
    with job.harvest_lock, ray_session(config.cluster, min_cpus=config.cluster.harvest_workers):
        _check_gpus(config)
        background = _Harvest(job)
        background.start()
        try:
            background.wait_for_rows()
            training_stage.run(config, run_dir, console, watch=background.check)
            background.join()
            background.check()
        finally:
            background.cancel()


def _check_one_pass(config: RunConfig, job: HarvestJob) -> None:
    max_steps = job.plan.n_rows // config.train.batch_tokens
    if config.cluster.retention == "consumed" and config.train.n_steps > max_steps:
        raise ConfigError(
            "cluster.retention",
            config.cluster.retention,
            f"keep, because train.tokens={config.train.tokens} needs more than the "
            f"{job.plan.n_rows} rows of the text",
            "set cluster.retention=keep, or "
            f"train.tokens={max_steps * config.train.batch_tokens} to train on every row once",
        )


def _check_gpus(config: RunConfig) -> None:
    import ray

    gpus, shards = int(ray.cluster_resources().get("GPU", 0)), config.model.shards
    workers = max(1, min(config.cluster.harvest_workers, gpus // shards))
    wanted = workers * shards + config.parallel.n_ranks
    if gpus and config.train.device != "cpu" and wanted > gpus:
        raise PlacementError(
            f"cluster.mode=concurrent: harvest workers and trainer ranks need {wanted} GPUs in "
            f"total, but the cluster has {gpus}; use train.device=cpu, lower "
            "cluster.harvest_workers, or use cluster.mode=sequential"
        )


class _Cancelled(Exception):
    """Ends the harvest because the trainer failed and needs no more rows."""


class _Harvest(threading.Thread):
    """A thread that fills the store, at most `max_lead_items` ahead of the trainer."""

    def __init__(self, job: HarvestJob) -> None:
        super().__init__(name="harvest", daemon=True)
        self._job = job
        self._cancelled = threading.Event()
        self._error: BaseException | None = None

    def run(self) -> None:
        """Fill the store. If an error occurs, keep it for `check` to raise."""
        try:
            harvest_stage.fill(self._job, self._may_start)
        except BaseException as error:  # `check` raises it again in the driver's thread
            self._error = error

    def check(self) -> None:
        """Raise any error that ended the harvest. Delete consumed items if so configured."""
        if self._error is not None:
            raise self._error
        # Delete only while this run holds the harvest lock, because only one process may delete at
        # once.
        if self._job.config.cluster.retention == "consumed" and self._job.harvest_lock.is_held:
            self._job.harvest_lock.check()
            delete_consumed(self._job.store)

    def wait_for_rows(self) -> None:
        """Wait until the first item is committed. If the harvest fails first, raise its error."""
        while not _has_rows(self._job.store):
            self.join(_POLL_S)
            if not self.is_alive():
                self.check()
                return

    def cancel(self) -> None:
        """Stop the harvest if it is still running. Committed items stay in the store."""
        self._cancelled.set()
        self.join()

    def _may_start(self, item: int | None) -> bool:
        """Return True if `item` is within the allowed lead. Raise `_Cancelled` if cancelled."""
        if self._cancelled.is_set():
            raise _Cancelled
        max_lead = self._job.config.cluster.max_lead_items
        if max_lead is None or item is None:
            return True
        states = list_consumers(self._job.store).values()
        if not states and training_stage.finished(self._job.config, self._job.run_dir):
            return True  # no trainer is left to wait for
        slowest = min((state.next_item for state in states), default=0)
        return item < slowest + max_lead or not self._sample_is_complete()

    def _sample_is_complete(self) -> bool:
        """Return True if the complete windows contain the rows that the trainer samples first.

        Until then the limit on the lead must not pause the harvest, or the harvest and the trainer
        would wait for each other.
        """
        config = self._job.config
        valid_rows = open_store(self._job.store).valid_rows
        window = config.store.window_items
        in_windows = valid_rows[: len(valid_rows) // window * window].sum()
        return bool(in_windows >= config.train.sample_tokens)


def _has_rows(path: str) -> bool:
    try:
        return store_exists(path) and open_store(path).n_items > 0
    except MissingDataError:
        # In an object store, the object that marks a store is written before the rest of the
        # store's metadata. If some metadata stays missing, the harvest's writer reports it.
        return False
