"""A thread pool shared by all stores in a process, for work that releases the GIL.

The calling thread also runs tasks, and never waits for a task that has not started. Therefore, a
task may call `run_all` without causing a deadlock, and a single task needs no other thread.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def available_cores() -> int:
    """Return the number of CPU cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


N_THREADS = min(available_cores(), 8)
"""Default number of threads per call of `run_all`, including the calling thread."""
_MOST_REQUESTS = 16  # number of threads for object store requests, which spend most time waiting
_pool: ThreadPoolExecutor | None = None
_lock = threading.Lock()


def _helpers() -> ThreadPoolExecutor:
    global _pool  # noqa: PLW0603 - one pool per process is intended
    with _lock:
        if _pool is None:
            size = max(2 * N_THREADS, _MOST_REQUESTS)
            _pool = ThreadPoolExecutor(size, thread_name_prefix="activation-store")
        return _pool


def _reset_pool() -> None:
    # A forked child process has none of its parent's threads, so using the parent's pool would
    # hang.
    global _pool, _lock  # noqa: PLW0603 - one pool per process is intended
    _pool = None
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_reset_pool)


def run_all(tasks: Sequence[Callable[[], T]], n_threads: int | None = None) -> list[T]:
    """Run all tasks concurrently.

    Args:
        tasks: Tasks to run, started in this order.
        n_threads: Maximum number of tasks to run at once; None means `N_THREADS`.

    Returns:
        The results, in the order of the tasks.

    Raises:
        BaseException: The error of the first failed task in the order of `tasks`. After a failure,
            no further tasks are started, but tasks that are already running are completed.
    """
    threads = min(n_threads or N_THREADS, len(tasks))
    if threads <= 1:
        return [task() for task in tasks]
    results: dict[int, T] = {}
    errors: dict[int, BaseException] = {}
    pending = deque(enumerate(tasks))

    def work() -> None:
        while not errors:
            try:
                number, task = pending.popleft()
            except IndexError:
                return
            try:
                results[number] = task()
            except BaseException as error:  # raised again below, in the calling thread
                errors[number] = error

    pool = _helpers()
    helpers = [pool.submit(work) for _ in range(threads - 1)]
    work()
    # A helper that has not started can be cancelled, since no tasks are left for it.
    for helper in helpers:
        if not helper.cancel():
            helper.result()
    if errors:
        raise errors[min(errors)]
    return [results[number] for number in range(len(tasks))]
