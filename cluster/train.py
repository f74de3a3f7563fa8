"""The train stage: trainer ranks as Ray actors, started anew together when one of them dies.

Ranks depend on each other in every step, so the first death ends all; fresh actors on a fresh port
continue from the newest valid checkpoint. Errors that we raised on purpose are not tried again.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from activation_store.errors import StoreConfigError, StoreError
from cluster.errors import ClusterError, PlacementError, RankFailedError
from cluster.metric_sinks import METRICS
from cluster.ray_session import ray_session
from cluster.run_dir import wait_for_old_ranks
from cluster.training_line import TrainingLine
from conf.schema import RunConfig
from sae_core.checkpoint.folder import newest_valid, read_state
from sae_core.errors import SAEError

_POLL_S = 0.5
_SETTLE_S = 3.0
"""After a first failure, how long to wait to learn whether some rank's process died."""


def run(config: RunConfig, run_dir: Path) -> None:
    """Trains to `train.tokens`, resuming from the newest valid checkpoint.

    Raises:
        StoreConfigError: there is no store.
        PlacementError: the cluster cannot hold the ranks.
        RankFailedError: ranks died more often than `cluster.max_failures`.
    """
    console = Console()
    if not (Path(config.store.path) / "zarr.json").is_file():
        raise StoreConfigError(
            "store.path",
            config.store.path,
            "a store of activations",
            "make one with stage=harvest or activation_store.StoreWriter",
        )
    wait_for_old_ranks(run_dir)
    done = _finished(config, run_dir)
    if done is not None:
        console.print(f"train: already done, {done.name}")
        return
    with ray_session(config.cluster, min_cpus=1):
        for failures in range(config.cluster.max_failures + 1):
            problem = _attempt(config, run_dir)
            if problem is None:
                break
            wait_for_old_ranks(run_dir)
            print(f"train: {problem}; attempt {failures + 1}", file=sys.stderr, flush=True)
        else:
            raise RankFailedError(
                f"trainer ranks died {config.cluster.max_failures + 1} times, last: {problem}; "
                f"see {run_dir / 'logs'}, then run the same command again to resume"
            )
    newest = newest_valid(run_dir / "checkpoints", hashes=False)
    console.print(f"train: done, {newest}")


def _finished(config: RunConfig, run_dir: Path) -> Path | None:
    newest = newest_valid(run_dir / "checkpoints", hashes=False)
    if newest is not None and read_state(newest).step >= config.train.n_steps:
        return newest
    return None


def _attempt(config: RunConfig, run_dir: Path) -> str | None:
    """One group of ranks, to its end. Returns what killed it, None when it finished."""
    import ray

    ranks = _place(config, run_dir)
    try:
        host, port = ray.get(ranks[0].address.remote(), timeout=config.cluster.placement_timeout_s)
        tasks = [rank.run.remote(host, port) for rank in ranks]
        _follow(tasks, config, run_dir)
        return _first_problem(tasks)
    finally:
        for rank in ranks:
            ray.kill(rank)


def _place(config: RunConfig, run_dir: Path) -> list[Any]:
    """One actor per rank, all placed, or none.

    Raises:
        PlacementError: not all of them came up in time.
    """
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    n_ranks = config.parallel.n_ranks
    options: dict[str, Any] = {"num_cpus": 0, "max_restarts": 0}
    timeout = config.cluster.placement_timeout_s
    if _wants_gpus(config):
        group = placement_group([{"GPU": 1}] * n_ranks, strategy="PACK")
        if not ray.wait([group.ready()], timeout=timeout)[0]:
            remove_placement_group(group)
            raise PlacementError(
                f"parallel.latent x parallel.data = {n_ranks} ranks: expected as many GPUs free "
                f"within {timeout:.0f} s, the cluster has {ray.cluster_resources().get('GPU', 0)}"
            )
        options |= {
            "num_gpus": 1,
            "scheduling_strategy": PlacementGroupSchedulingStrategy(placement_group=group),
        }
    actor = ray.remote(_Rank).options(**options)
    ranks = [actor.remote(str(run_dir), index, n_ranks) for index in range(n_ranks)]
    ready = [rank.ready.remote() for rank in ranks]
    placed, missing = ray.wait(ready, num_returns=n_ranks, timeout=timeout)
    if missing:
        for rank in ranks:
            ray.kill(rank)
        raise PlacementError(
            f"{len(placed)} of {n_ranks} ranks were placed within {timeout:.0f} s; "
            "lower parallel.latent or parallel.data, or raise cluster.placement_timeout_s"
        )
    return ranks


def _wants_gpus(config: RunConfig) -> bool:
    import ray

    if config.train.device == "auto":
        return bool(ray.cluster_resources().get("GPU", 0))
    return config.train.device == "cuda"


def _follow(tasks: list[Any], config: RunConfig, run_dir: Path) -> None:
    """Shows rank 0's metrics until all ranks have finished or the first one has failed."""
    import ray

    line = TrainingLine(config.train.n_steps)
    path = run_dir / METRICS
    offset = path.stat().st_size if path.exists() else 0
    waiting = list(tasks)
    try:
        while waiting:
            done, waiting = ray.wait(waiting, timeout=_POLL_S)
            if path.exists():
                offset = _show_new_rows(path, offset, line)
            if any(_error_of(task) is not None for task in done):
                return
    finally:
        line.close()


def _show_new_rows(path: Path, offset: int, line: TrainingLine) -> int:
    with open(path, "rb") as file:
        file.seek(offset)
        for raw in file:
            if not raw.endswith(b"\n"):
                break  # rank 0 is in the middle of writing it
            line.show(json.loads(raw))
            offset += len(raw)
    return offset


def _first_problem(tasks: list[Any]) -> str | None:
    """What went wrong, or None; raises what no second attempt would mend."""
    import ray

    if all(_is_done(task) and _error_of(task) is None for task in tasks):
        return None
    # A survivor's broken connection often shows before the death that caused it.
    ray.wait(tasks, num_returns=len(tasks), timeout=_SETTLE_S)
    errors = [error for error in map(_error_of, filter(_is_done, tasks)) if error is not None]
    deaths = [error for error in errors if isinstance(error, ray.exceptions.RayActorError)]
    if deaths:
        return "a trainer rank died"
    for error in errors:
        if isinstance(error.cause, SAEError | StoreError | ClusterError):
            raise error.cause
    for error in errors:
        if not isinstance(error.cause, RuntimeError):
            raise error  # a defect of ours; its text carries the rank's traceback
    # What torch raises when a collective breaks; nothing tells it from other RuntimeErrors.
    return f"a trainer rank failed: {str(errors[0].cause).splitlines()[0][:200]}"


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


class _Rank:
    """The actor: a process of its own that becomes one trainer rank."""

    def __init__(self, run_dir: str, rank: int, n_ranks: int) -> None:
        self.run_dir, self.rank, self.n_ranks = Path(run_dir), rank, n_ranks
        log = open(self.run_dir / "logs" / f"rank-{rank}.log", "ab", buffering=0)  # noqa: SIM115
        # For the whole life of the process, native libraries included.
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)

    def ready(self) -> int:
        """Process id, once the actor runs."""
        return os.getpid()

    def address(self) -> tuple[str, int]:
        """Where rank 0 listens: this node's address and a port that is free now."""
        import socket

        import ray

        with socket.socket() as free:
            free.bind(("", 0))
            return ray.util.get_node_ip_address(), free.getsockname()[1]

    def run(self, host: str, port: int) -> None:
        """Trains."""
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
        os.environ.update(
            RANK=str(self.rank),
            WORLD_SIZE=str(self.n_ranks),
            LOCAL_RANK="0" if os.environ.get("CUDA_VISIBLE_DEVICES") else str(self.rank),
            MASTER_ADDR=host,
            MASTER_PORT=str(port),
        )
        from cluster.rank import run_rank

        now = time.strftime("%Y-%m-%d %H:%M:%S")
        print(f"{now} rank {self.rank} of {self.n_ranks}, process {os.getpid()}", flush=True)
        run_rank(self.run_dir)
