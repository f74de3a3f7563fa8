"""A pool of harvest workers, each with a bounded number of items in flight."""

from __future__ import annotations

import shutil
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cluster.errors import ClusterError, PlacementError
from cluster.harvest.worker import FirstItem, HarvestWorker, ItemResult, WorkerSpec
from conf.schema.cluster import ClusterConfig

POLL_S = 0.5
STARTS_WITHOUT_PROGRESS = 5
"""Number of starts per worker, with no item finished in between, before the harvest gives up."""

Work = tuple[int, NDArray[np.int64]]
"""Item number, and the numbers of the contexts in that item."""


class WorkerPool:
    """Ray actors that Ray restarts when they die.

    Use as a context manager inside a `ray_session`.
    """

    def __init__(self, spec: WorkerSpec, n_workers: int, config: ClusterConfig) -> None:
        """Start the workers and wait until Ray has placed all of them.

        Raises:
            PlacementError: If some workers are not placed within `config.placement_timeout_s`.
        """
        import ray

        self._spec = spec
        self._in_flight = config.items_in_flight
        self._placement_timeout_s = config.placement_timeout_s
        shutil.rmtree(spec.starts_dir, ignore_errors=True)
        spec.starts_dir.mkdir(parents=True)
        slots = {"num_gpus" if spec.device == "cuda" else "num_cpus": spec.model.shards}
        actor = ray.remote(max_restarts=-1, max_task_retries=-1, **slots)(HarvestWorker)
        self.workers: list[Any] = [actor.remote(spec) for _ in range(n_workers)]
        waiting = [worker.ready.remote() for worker in self.workers]
        ready, missing = ray.wait(
            waiting, num_returns=n_workers, timeout=config.placement_timeout_s
        )
        if missing:
            self.close()
            raise PlacementError(
                f"cluster.harvest_workers={n_workers}: only {len(ready)} workers were placed "
                f"within cluster.placement_timeout_s={config.placement_timeout_s:g}; the cluster "
                f"has {ray.cluster_resources()} and each worker needs {slots} on one node; lower "
                "cluster.harvest_workers or model.shards"
            )

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the workers."""
        import ray

        for worker in self.workers:
            ray.kill(worker)
        shutil.rmtree(self._spec.starts_dir, ignore_errors=True)

    def calibrate(self, work: Work) -> FirstItem:
        """Measure every hookpoint with the first worker while the others load the model."""
        loading = [worker.warm_up.remote() for worker in self.workers[1:]]
        found: FirstItem = self._result(self.workers[0].calibrate.remote(*work))
        for reference in loading:
            self._result(reference)
        return found

    def run(
        self, work: Iterable[Work], may_start: Callable[[int | None], bool] = lambda _: True
    ) -> Iterator[ItemResult | None]:
        """Run every item and report progress at least every `POLL_S` seconds.

        Args:
            work: The items, in the order in which they start.
            may_start: Called with the next item's number until it returns True, and with None once
                per poll. If it raises, the run ends.

        Yields:
            The result of each item as it finishes, or None if no item finished during a poll.

        Raises:
            ClusterError: If workers keep dying without finishing an item.
        """
        import ray

        queue = iter(work)
        upcoming = next(queue, None)
        free = deque(self.workers * self._in_flight)  # one entry per free slot of a worker
        pending: dict[Any, tuple[Any, Work]] = {}  # task -> its worker and its item
        stall = _StallTimeout(self._placement_timeout_s)
        finished: set[int] = set()
        starts = self._starts()
        while True:
            open_items = [given for _, given in pending.values() if given[0] not in finished]
            if upcoming is None and not open_items:
                return
            if not open_items:
                stall.reset()  # idle time must not count as a stall
            may_start(None)
            while upcoming is not None and free and may_start(upcoming[0]):
                worker = free.popleft()
                pending[worker.run_item.remote(*upcoming)] = worker, upcoming
                upcoming = next(queue, None)
            if not pending:
                time.sleep(POLL_S)
                yield None
                continue
            done, _ = ray.wait(list(pending), timeout=POLL_S)
            for task in done:
                result = self._result(task)
                worker, (item, _) = pending.pop(task)
                free.append(worker)
                starts = self._starts()
                stall.reset()
                if item not in finished:  # a reassigned item finishes twice
                    finished.add(item)
                    yield result
            if not done:
                self._check_restarts(starts)
                if stall.timed_out():
                    # A frozen worker never answers, and a worker whose node is lost may never be
                    # placed again. Give the items of such workers to idle workers as well. Two
                    # workers may safely compute the same item, because they produce the same bytes.
                    idle = [w for w in free if free.count(w) == self._in_flight]
                    for worker, again in zip(idle, open_items, strict=False):
                        free.remove(worker)
                        pending[worker.run_item.remote(*again)] = worker, again
                yield None

    def _result(self, task: Any) -> Any:
        """Wait for a task and return its result. Raise ClusterError if workers keep dying."""
        import ray

        starts = self._starts()
        while True:
            try:
                return ray.get(task, timeout=POLL_S)
            except ray.exceptions.GetTimeoutError:
                self._check_restarts(starts)
            except ray.exceptions.RayTaskError as error:
                # Raise the worker's own error, because Ray's wrapper repeats the traceback in its
                # message.
                raise error.cause from error

    def _starts(self) -> int:
        """Return the number of worker starts so far, including restarts."""
        return sum(1 for _ in self._spec.starts_dir.iterdir())

    def _check_restarts(self, starts_at_last_progress: int) -> None:
        starts = self._starts() - starts_at_last_progress
        if starts > STARTS_WITHOUT_PROGRESS * len(self.workers):
            raise ClusterError(
                f"harvest workers started {starts} times without finishing an item: they crash or "
                "are killed, most often for lack of memory; lower cluster.harvest_workers"
            )


class _StallTimeout:
    """A timeout for stalled items that adapts to how long items take.

    It runs out after three times the longest wait for a finished item so far, but never before
    `least_s` seconds.
    """

    def __init__(self, least_s: float) -> None:
        self._least_s = least_s
        self._longest_s = 0.0
        self._since = time.monotonic()
        self._ran_out = False

    def reset(self) -> None:
        """Restart the timeout, because an item finished or no item is in flight."""
        now = time.monotonic()
        if not self._ran_out:  # a stall says nothing about how long items normally take
            self._longest_s = max(self._longest_s, now - self._since)
        self._since = now
        self._ran_out = False

    def timed_out(self) -> bool:
        """Return whether the timeout has run out. If it has, restart it."""
        now = time.monotonic()
        if now - self._since <= max(self._least_s, 3 * self._longest_s):
            return False
        self._since = now
        self._ran_out = True
        return True
