"""Start the trainer ranks, monitor them, and restart them after a failure."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cluster.errors import PlacementError, PreemptedError, RankFailedError
from cluster.preemption import StopRequest, on_preemption
from cluster.progress import Progress
from cluster.ray_session import ray_session
from cluster.run_folder.files import LOGS
from cluster.run_folder.lock import wait_for_old_ranks
from cluster.training.heartbeats import Heartbeats
from cluster.training.rank_actors import rank_group
from conf.schema.run import RunConfig
from foundation.errors import FoundryError

_POLL_S = 0.5
"""Seconds between two checks of the ranks."""
_SETTLE_S = 3.0
"""Seconds to wait after the first failure, to find out whether some rank's process died."""


class _Failure(NamedTuple):
    """The reason why a group of ranks ended before it had trained to the end."""

    problem: str
    failed_at: float
    """Time at which the group ended, from `time.monotonic()`."""


def train_ranks(
    config: RunConfig,
    run_dir: Path,
    progress: Progress,
    watch: Callable[[], None] = lambda: None,
    cells: Callable[[], Sequence[str]] | None = None,
) -> None:
    """Start groups of ranks, one after another, until a group has trained to the end.

    Args:
        config: Config of the run, or of any cell of a sweep.
        run_dir: The run's folder, or the sweep's.
        progress: Display of the training progress.
        watch: See `run`.
        cells: For a sweep, a function that returns the cells that are still to be trained. It is
            called before every attempt.

    Raises:
        PlacementError: See `run`.
        RankFailedError: See `run`.
        PreemptedError: See `run`.
    """
    stop_request = StopRequest(run_dir)
    stop_request.clear()
    with (
        ray_session(config.cluster, min_cpus=1),
        on_preemption(stop_request.request, config.checkpoint.grace_s),
    ):
        failed_at: float | None = None
        for failures in range(config.cluster.max_failures + 1):
            names = cells() if cells is not None else ()
            if cells is not None and not names:
                break  # the remaining cells finished or failed before their ranks died
            failure = _attempt(config, run_dir, progress, watch, failed_at, names)
            if failure is None:
                break
            problem, failed_at = failure
            if stop_request.signal_name:
                wait_for_old_ranks(run_dir)
                raise PreemptedError(f"{problem} (while stopping for {stop_request.signal_name})")
            print(f"train: attempt {failures + 1} failed: {problem}", file=sys.stderr, flush=True)
            wait_for_old_ranks(run_dir)
        else:
            raise RankFailedError(
                f"trainer ranks failed {config.cluster.max_failures + 1} times; last problem: "
                f"{problem}; see {run_dir / LOGS}, then rerun the command to resume"
            )
        if stop_request.signal_name:
            # Too late to stop the ranks, but the stages after this one must not start.
            raise PreemptedError(f"{stop_request.signal_name} arrived after training had ended")


def _attempt(
    config: RunConfig,
    run_dir: Path,
    progress: Progress,
    watch: Callable[[], None],
    failed_at: float | None,
    cells: Sequence[str],
) -> _Failure | None:
    """Run one group of ranks until it ends.

    Args:
        config: See `train_ranks`.
        run_dir: See `train_ranks`.
        progress: See `train_ranks`.
        watch: See `train_ranks`.
        failed_at: Time (`time.monotonic`) at which the last attempt failed, or None if none has
            failed.
        cells: Names of the sweep's cells to train. Empty for an ordinary run.

    Returns:
        Why the group ended, or None if it trained to the end.
    """
    import ray

    heartbeats = Heartbeats(run_dir, config.parallel.n_ranks, config.train.hang_timeout_s)
    try:
        with rank_group(config, run_dir) as ranks:
            timeout_s = config.cluster.placement_timeout_s
            host, port = ray.get(ranks[0].address.remote(), timeout=timeout_s)
            tasks = [rank.run.remote(host, port, cells) for rank in ranks]
            with progress:
                frozen = _follow(tasks, progress, watch, heartbeats, failed_at)
            ended_at = time.monotonic()
            problem = frozen or _first_problem(tasks, heartbeats)
            return _Failure(problem, ended_at) if problem else None
    except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError):
        return _Failure(
            "a trainer rank died, or did not answer, before training began",
            failed_at or time.monotonic(),
        )
    except PlacementError as error:
        # Ray takes a while to notice a lost node. After a failure, the ranks may therefore soon fit
        # again. In the first attempt, the error is final.
        if failed_at is None:
            raise
        return _Failure(str(error), failed_at)


def _follow(
    tasks: list[Any],
    progress: Progress,
    watch: Callable[[], None],
    heartbeats: Heartbeats,
    failed_at: float | None,
) -> str | None:
    """Show progress until all ranks have finished or the first one has failed.

    Returns:
        The problem if ranks are frozen, because no task reports frozen ranks. Otherwise None.
    """
    import ray

    waiting = list(tasks)
    while waiting:
        done, waiting = ray.wait(waiting, timeout=_POLL_S)
        watch()
        if failed_at is not None and heartbeats.steps_taken():
            gap_s = time.monotonic() - failed_at
            print(f"train: resumed after {gap_s:.1f} s", file=sys.stderr, flush=True)
            failed_at = None
        progress.show()
        if any(_error_of(task) is not None for task in done):
            return None
        if frozen := heartbeats.frozen():
            return f"trainer ranks {frozen} are frozen: no heartbeat"
    return None


def _first_problem(tasks: list[Any], heartbeats: Heartbeats) -> str | None:
    """Return what went wrong, or None. Raise errors that a second attempt would not fix."""
    import ray

    if all(_is_done(task) and _error_of(task) is None for task in tasks):
        return None
    # A surviving rank often reports a broken connection before Ray reports the death that caused
    # it.
    ray.wait(tasks, num_returns=len(tasks), timeout=_SETTLE_S)
    errors = [error for error in map(_error_of, filter(_is_done, tasks)) if error is not None]
    deaths = [error for error in errors if isinstance(error, ray.exceptions.RayActorError)]
    if hung := heartbeats.hung():
        return f"no progress: a trainer rank hung; stacks are in the logs of ranks {hung}"
    if deaths:
        return "a trainer rank died"
    for error in errors:
        # An OSError that names a file, such as one of a full disk, needs the user.
        cause = cause_of(error)
        if isinstance(cause, FoundryError) or (isinstance(cause, OSError) and cause.filename):
            raise cause
    for error in errors:
        if not isinstance(cause_of(error), RuntimeError):
            raise error  # a bug in this project; the message has the rank's traceback
    # torch raises a RuntimeError when a collective breaks, which looks like any other RuntimeError.
    return f"a trainer rank failed: {str(cause_of(errors[0])).splitlines()[0][:200]}"


def cause_of(error: Any) -> Any:
    """Return the error that the rank raised or, if Ray did not pass it on, Ray's own error."""
    return getattr(error, "cause", None) or error


def _is_done(task: Any) -> bool:
    import ray

    return bool(ray.wait([task], timeout=0)[0])


def _error_of(task: Any) -> Any:
    import ray

    if not _is_done(task):
        return None
    try:
        ray.get(task)
    except ray.exceptions.RayError as error:
        return error
    return None
