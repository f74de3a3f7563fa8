"""A pool of harvest workers: placed or refused, kept busy with a bounded number of items each."""

from __future__ import annotations

import shutil
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cluster.config import ClusterConfig
from cluster.errors import ClusterError, PlacementError
from cluster.harvest_worker import HarvestWorker, WorkerSpec

POLL_S = 0.5
STARTS_WITHOUT_PROGRESS = 5
"""Starts per worker, with no item finished between them, after which the harvest gives up."""

Work = tuple[int, NDArray[np.int64]]
"""Item number and the contexts it holds."""


class WorkerPool:
    """Ray actors that restart by themselves; use as a context manager inside a ray_session."""

    def __init__(self, spec: WorkerSpec, n_workers: int, config: ClusterConfig) -> None:
        """Places the workers.

        Raises:
            PlacementError: Not all of them within `config.placement_timeout_s`.
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
                f"cluster.harvest_workers={n_workers}: {len(ready)} were placed within "
                f"cluster.placement_timeout_s={config.placement_timeout_s:g}; the cluster has "
                f"{ray.cluster_resources()} and each needs {slots} on one node; lower "
                "cluster.harvest_workers or model.shards"
            )

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the workers."""
        import ray

        for worker in self.workers:
            ray.kill(worker)
        shutil.rmtree(self._spec.starts_dir, ignore_errors=True)

    def calibrate(self, work: Work) -> dict[str, Any]:
        """Has the first worker measure every hookpoint while the others load the model."""
        loading = [worker.warm_up.remote() for worker in self.workers[1:]]
        moments: dict[str, Any] = self._result(self.workers[0].calibrate.remote(*work))
        for reference in loading:
            self._result(reference)
        return moments

    def run(
        self, work: Iterable[Work], may_start: Callable[[int | None], bool] = lambda _: True
    ) -> Iterator[int | None]:
        """Runs every item; yields the rows of each finished one, and None while none has finished.

        Args:
            work: the items, in the order in which they are begun.
            may_start: whether an item may be begun; asked again and again, with None when there
                is none to begin. What it raises ends the run.

        Raises:
            ClusterError: Workers keep dying without finishing an item.
        """
        import ray

        queue = iter(work)
        upcoming = next(queue, None)
        free = deque(self.workers * self._in_flight)
        pending: dict[Any, tuple[Any, Work]] = {}  # task -> the worker that has it, and the item
        patience = _Patience(self._placement_timeout_s)
        finished: set[int] = set()
        starts = self._starts()
        while True:
            open_items = [given for _, given in pending.values() if given[0] not in finished]
            if upcoming is None and not open_items:
                return
            if not open_items:
                patience.reset()  # nobody has anything to do
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
                rows = self._result(task)
                worker, (item, _) = pending.pop(task)
                free.append(worker)
                starts = self._starts()
                patience.reset()
                if item not in finished:
                    finished.add(item)
                    yield rows
            if not done:
                self._refuse_endless_restarts(starts)
                if patience.lost():
                    # A worker whose node is lost waits for a place, perhaps for ever, and a frozen
                    # one never answers. Two workers on one item do no harm: their bytes are equal.
                    idle = [w for w in free if free.count(w) == self._in_flight]
                    for worker, again in zip(idle, open_items, strict=False):
                        free.remove(worker)
                        pending[worker.run_item.remote(*again)] = worker, again
                yield None

    def _result(self, task: Any) -> Any:
        import ray

        starts = self._starts()
        while True:
            try:
                return ray.get(task, timeout=POLL_S)
            except ray.exceptions.GetTimeoutError:
                self._refuse_endless_restarts(starts)
            except ray.exceptions.RayTaskError as error:
                # Ours, as the worker raised it, without the wrapping that repeats its traceback.
                raise error.cause from error

    def _starts(self) -> int:
        return sum(1 for _ in self._spec.starts_dir.iterdir())

    def _refuse_endless_restarts(self, starts_at_last_progress: int) -> None:
        starts = self._starts() - starts_at_last_progress
        if starts > STARTS_WITHOUT_PROGRESS * len(self.workers):
            raise ClusterError(
                f"harvest workers died {starts} times without finishing an item: they are killed "
                "from outside or crash, most often for lack of memory; lower "
                "cluster.harvest_workers"
            )


class _Patience:
    """Runs out when no item has been finished for far longer than any took before."""

    def __init__(self, least_s: float) -> None:
        self._least_s, self._longest_s = least_s, 0.0
        self._since, self._ran_out = time.monotonic(), False

    def reset(self) -> None:
        """An item was finished, or none is under way."""
        now = time.monotonic()
        if not self._ran_out:
            self._longest_s = max(self._longest_s, now - self._since)
        self._since, self._ran_out = now, False

    def lost(self) -> bool:
        """Whether it has run out; it then begins anew."""
        now = time.monotonic()
        if now - self._since <= max(self._least_s, 3 * self._longest_s):
            return False
        self._since, self._ran_out = now, True
        return True
