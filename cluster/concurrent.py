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

from activation_store import (
    consumers,
    delete_consumed,
    open_store,
    store_exists,
)
from activation_store.errors import MissingDataError
from cluster import harvest, train
from cluster.errors import PlacementError
from cluster.ray_session import ray_session
from conf.schema import RunConfig
from sae_core.errors import ConfigError

if TYPE_CHECKING:
    from cluster.harvest import HarvestJob

_POLL_S = 0.2


def run(config: RunConfig, run_dir: Path) -> None:
    """Fills the store and trains on it; returns when both are done.

    Raises as both stages do, and:
        ConfigError: deletion is asked for, but the text does not last for one pass.
        PlacementError: harvest and ranks together need more GPUs than there are.
    """
    from rich.console import Console

    console = Console(soft_wrap=True)
    job = harvest.prepare(config, run_dir, console, live=False)
    if job is None:
        train.run(config, run_dir, console)
        return
    _check_one_pass(config, job)
    if job.resuming:
        job.claim.take()  # before anything is started
    with job.claim, ray_session(config.cluster, min_cpus=config.cluster.harvest_workers):
        _check_gpus(config)
        background = _Harvest(job)
        background.start()
        try:
            background.wait_for_rows()
            train.run(config, run_dir, console, watch=background.check)
            background.join()
            background.check()
        finally:
            background.cancel()


def _check_one_pass(config: RunConfig, job: HarvestJob) -> None:
    most = job.plan.n_rows // config.train.batch_tokens
    if config.cluster.retention == "consumed" and config.train.n_steps > most:
        raise ConfigError(
            "cluster.retention",
            config.cluster.retention,
            f"keep: the text gives {job.plan.n_rows} rows, train.tokens={config.train.tokens}",
            f"train.tokens={most * config.train.batch_tokens} sees every row once",
        )


def _check_gpus(config: RunConfig) -> None:
    import ray

    gpus, shards = int(ray.cluster_resources().get("GPU", 0)), config.model.shards
    workers = max(1, min(config.cluster.harvest_workers, gpus // shards))
    wanted = workers * shards + config.parallel.n_ranks
    if gpus and config.train.device != "cpu" and wanted > gpus:
        raise PlacementError(
            f"cluster.mode=concurrent: harvest and trainer ranks want {wanted} GPUs together, the "
            f"cluster has {gpus}; use train.device=cpu, fewer cluster.harvest_workers, or "
            "cluster.mode=sequential"
        )


class _Cancelled(Exception):
    """The trainer failed: nobody needs more rows now."""


class _Harvest(threading.Thread):
    """Fills the store beside the trainer, no further ahead of it than `max_lead_items`."""

    def __init__(self, job: HarvestJob) -> None:
        super().__init__(name="harvest", daemon=True)
        self._job = job
        self._cancelled = threading.Event()
        self._error: BaseException | None = None

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
        # Only with the claim: one process at a time may delete.
        if self._job.config.cluster.retention == "consumed" and self._job.claim.is_taken:
            self._job.claim.check()
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

    def _may_start(self, item: int | None) -> bool:
        """Whether `item` is within the lead; None asks only whether to go on."""
        if self._cancelled.is_set():
            raise _Cancelled
        most = self._job.config.cluster.max_lead_items
        if most is None or item is None:
            return True
        states = consumers(self._job.store).values()
        if not states and train.finished(self._job.config, self._job.run_dir):
            return True
        slowest = min((state.next_item for state in states), default=0)
        return item < slowest + most or not self._can_be_sampled()

    def _can_be_sampled(self) -> bool:
        """Whether whole windows hold the rows that the trainer asks for before it begins."""
        config = self._job.config
        valid_rows, window = open_store(self._job.store).valid_rows, config.store.window_items
        in_windows = valid_rows[: len(valid_rows) // window * window].sum()
        return bool(in_windows >= config.train.sample_tokens)


def _has_rows(path: str) -> bool:
    try:
        return store_exists(path) and open_store(path).n_items > 0
    except MissingDataError:
        # In an object store the object that makes it a store comes before the rest of its
        # metadata. Should something be missing for good, the harvest's writer says so.
        return False
