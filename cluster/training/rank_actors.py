"""Trainer ranks as Ray actors, which are placed together or not at all and killed together."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cluster.errors import PlacementError
from cluster.openmp import waiting_variables
from cluster.run_folder.files import rank_log
from conf.schema.run import RunConfig


@contextmanager
def rank_group(config: RunConfig, run_dir: Path) -> Iterator[list[Any]]:
    """Start an actor for each rank. When the block ends, kill them and release their GPUs.

    CPU ranks reserve no resources in Ray, because the user decides how many ranks share the cores.

    Yields:
        The actor handles of all ranks, rank 0 first.

    Raises:
        PlacementError: If the ranks were not all placed in time, or one of them failed to start.
        RayActorError: If a rank's process or node died while it started.
    """
    import ray
    from ray.util.placement_group import remove_placement_group

    n_ranks = config.parallel.n_ranks
    group = _gpu_group(config, n_ranks) if _wants_gpus(config) else None
    ranks: list[Any] = []
    try:
        actor = ray.remote(RankActor).options(**_options(group))
        alone = n_ranks == 1 and config.cluster.mode == "sequential"
        ranks = [actor.remote(str(run_dir), index, n_ranks, alone) for index in range(n_ranks)]
        _wait_until_ready(ranks, config.cluster.placement_timeout_s)
        yield ranks
    finally:
        for rank in ranks:
            ray.kill(rank)
        if group is not None:
            remove_placement_group(group)


def _options(group: Any) -> dict[str, Any]:
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    options: dict[str, Any] = {"num_cpus": 0, "max_restarts": 0}
    if group is not None:
        strategy = PlacementGroupSchedulingStrategy(placement_group=group)
        options |= {"num_gpus": 1, "scheduling_strategy": strategy}
    return options


def _wait_until_ready(ranks: list[Any], timeout_s: float) -> None:
    import ray

    ready = [rank.ready.remote() for rank in ranks]
    placed, missing = ray.wait(ready, num_returns=len(ranks), timeout=timeout_s)
    if missing:
        raise PlacementError(
            f"only {len(placed)} of {len(ranks)} ranks were placed within {timeout_s:.0f} s; "
            "lower parallel.latent or parallel.data, or raise cluster.placement_timeout_s"
        )
    try:
        ray.get(placed)
    except ray.exceptions.RayActorError as error:
        if not _failed_to_start(error):
            raise
        raise PlacementError(
            f"a rank failed to start: {error}; the run folder must be on a file system that all "
            "nodes share"
        ) from error


def _failed_to_start(error: Any) -> bool:
    """Return True if the actor's constructor raised, False if its process or node died.

    The two cases can be told apart only by the text of Ray's error.
    """
    return "error raised in its creation task" in str(error)


def _gpu_group(config: RunConfig, n_ranks: int) -> Any:
    """Reserve one GPU per rank, on as few nodes as possible."""
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group

    have = int(ray.cluster_resources().get("GPU", 0))
    what = f"parallel.latent x parallel.data = {n_ranks} ranks"
    if config.cluster.address is None and have < n_ranks:
        # A private cluster does not grow, so waiting for more GPUs would not help.
        raise PlacementError(
            f"{what} with train.device={config.train.device!r}: expected one GPU per rank, but "
            f"this machine has {have}; use fewer ranks, train.device=cpu, or cluster=join"
        )
    timeout_s = config.cluster.placement_timeout_s
    group = placement_group([{"GPU": 1}] * n_ranks, strategy="PACK")
    if not ray.wait([group.ready()], timeout=timeout_s)[0]:
        remove_placement_group(group)
        raise PlacementError(
            f"{what}: expected one free GPU per rank, but too few became free within "
            f"{timeout_s:.0f} s (the cluster has {have} GPUs in total); wait until enough are "
            "free, or use fewer ranks"
        )
    return group


def _wants_gpus(config: RunConfig) -> bool:
    import ray

    if config.train.device == "auto":
        return bool(ray.cluster_resources().get("GPU", 0))
    return config.train.device == "cuda"


class RankActor:
    """A Ray actor whose process becomes one trainer rank.

    Args:
        run_dir: The run's folder. Output goes to `logs/rank-<rank>.log` in this folder.
        rank: Index of this rank.
        n_ranks: Number of ranks.
        alone: See `waiting_variables`.
    """

    def __init__(self, run_dir: str, rank: int, n_ranks: int, alone: bool) -> None:
        self.run_dir = Path(run_dir)
        self.rank = rank
        self.n_ranks = n_ranks
        os.environ.update(waiting_variables(alone))
        # Keep the file open until the process ends, hence no `with`. Replacing the descriptors also
        # redirects the output of native libraries.
        log = open(rank_log(self.run_dir, rank), "ab", buffering=0)  # noqa: SIM115
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)

    def ready(self) -> int:
        """Return the process id as soon as the actor runs."""
        return os.getpid()

    def address(self) -> tuple[str, int]:
        """Return this node's address and a free port, for rank 0 to listen on."""
        import socket

        import ray

        with socket.socket() as free:
            free.bind(("", 0))
            return ray.util.get_node_ip_address(), free.getsockname()[1]

    def run(self, host: str, port: int, cells: Sequence[str]) -> None:
        """Train the run or, in a sweep, these cells.

        Args:
            host: Address of rank 0.
            port: Port of rank 0.
            cells: Names of the sweep's cells to train. Empty for an ordinary run.
        """
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
        run_rank(self.run_dir, cells=cells)
