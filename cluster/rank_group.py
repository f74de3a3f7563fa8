"""Trainer ranks as Ray actors: all placed or none, all gone at the end."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cluster.errors import PlacementError
from cluster.openmp import waiting_variables
from conf.schema import RunConfig


@contextmanager
def rank_group(config: RunConfig, run_dir: Path) -> Iterator[list[Any]]:
    """Actor handles of all ranks, rank 0 first; killed, and their GPUs given back, at the end.

    On the CPU ranks ask Ray for no resource: how many share the cores is the user's choice.

    Raises:
        PlacementError: not all of them came up in time, or one cannot start.
        RayActorError: one died while it started, or its node did.
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
            f"{len(placed)} of {len(ranks)} ranks were placed within {timeout_s:.0f} s; "
            "lower parallel.latent or parallel.data, or raise cluster.placement_timeout_s"
        )
    try:
        ray.get(placed)
    except ray.exceptions.RayActorError as error:
        if not _failed_to_start(error):
            raise
        raise PlacementError(
            f"a rank cannot start: {error}; the run folder must lie on a file system that all "
            "nodes share"
        ) from error


def _failed_to_start(error: Any) -> bool:
    """Whether the actor's own constructor raised; else its process or its node was killed.

    Ray has no other sign of it than the text.
    """
    return "error raised in its creation task" in str(error)


def _gpu_group(config: RunConfig, n_ranks: int) -> Any:
    """A placement group with one GPU per rank, as close together as there is room."""
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group

    have = int(ray.cluster_resources().get("GPU", 0))
    what = f"parallel.latent x parallel.data = {n_ranks} ranks"
    if config.cluster.address is None and have < n_ranks:
        # A private cluster will not grow: no need to wait for what it does not have.
        raise PlacementError(
            f"{what} with train.device={config.train.device!r}: expected as many GPUs, this "
            f"machine has {have}; use fewer ranks, train.device=cpu, or cluster=join"
        )
    timeout_s = config.cluster.placement_timeout_s
    group = placement_group([{"GPU": 1}] * n_ranks, strategy="PACK")
    if not ray.wait([group.ready()], timeout=timeout_s)[0]:
        remove_placement_group(group)
        raise PlacementError(
            f"{what}: expected as many GPUs free within {timeout_s:.0f} s, the cluster has {have}; "
            "wait for them, or use fewer ranks"
        )
    return group


def _wants_gpus(config: RunConfig) -> bool:
    import ray

    if config.train.device == "auto":
        return bool(ray.cluster_resources().get("GPU", 0))
    return config.train.device == "cuda"


class RankActor:
    """The actor: a process of its own that becomes one trainer rank."""

    def __init__(self, run_dir: str, rank: int, n_ranks: int, alone: bool) -> None:
        self.run_dir, self.rank, self.n_ranks = Path(run_dir), rank, n_ranks
        os.environ.update(waiting_variables(alone))
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

    def run(self, host: str, port: int, cells: Sequence[str]) -> None:
        """Trains; of a sweep, these cells."""
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
