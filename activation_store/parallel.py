"""A few threads that all stores of the process share, for what lets go of the interpreter's lock.

The thread that asks works too, and never waits for a task that has not begun: so tasks may
themselves ask, and one task costs no thread at all.
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
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


N_THREADS = min(available_cores(), 8)
"""Threads that work on one request, the asking one included."""
_MOST_REQUESTS = 16  # to an object store: their threads wait more than they work
_pool: ThreadPoolExecutor | None = None
_lock = threading.Lock()


def _helpers() -> ThreadPoolExecutor:
    global _pool  # noqa: PLW0603 - one pool per process is the point
    with _lock:
        if _pool is None:
            size = max(2 * N_THREADS, _MOST_REQUESTS)
            _pool = ThreadPoolExecutor(size, thread_name_prefix="activation-store")
        return _pool


def _forget_pool() -> None:
    # A forked child has none of its parent's threads: a pool that believes so would hang it.
    global _pool, _lock  # noqa: PLW0603 - the process's own pool, as above
    _pool, _lock = None, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_pool)


def run_all(tasks: Sequence[Callable[[], T]], n_threads: int | None = None) -> list[T]:
    """Runs every task, several at once; their results in the order of the tasks.

    Args:
        tasks: To run; begun in this order.
        n_threads: Most that run at once; None is `N_THREADS`.

    Raises:
        BaseException: Whatever the first task in order that failed has raised. Tasks that had not
            begun by then are dropped; those that had are waited for.
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
            except BaseException as error:  # noqa: BLE001 - raised again below
                errors[number] = error

    pool = _helpers()
    helpers = [pool.submit(work) for _ in range(threads - 1)]
    work()
    for helper in helpers:
        if not helper.cancel():
            helper.result()
    if errors:
        raise errors[min(errors)]
    return [results[number] for number in range(len(tasks))]
