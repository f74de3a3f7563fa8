"""Ray, quietly and privately: started when nobody gave an address, joined otherwise."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from cluster.config import ClusterConfig
from cluster.errors import PlacementError
from cluster.preemption import signals_kept

OBJECT_STORE_BYTES = 128 << 20
"""Only commit records and metrics pass through Ray; activations go straight to the store."""


@contextmanager
def ray_session(config: ClusterConfig, min_cpus: int = 1) -> Iterator[None]:
    """Gives the block a Ray cluster, and stops afterwards only what it started itself.

    Within a process that is already connected to Ray this does nothing. With `config.address` it
    joins that cluster and leaves it at the end. Otherwise it starts one without dashboard, usage
    statistics and log forwarding, which dies with this process. Ray's ports listen on all
    interfaces, whatever address it is given; what keeps others out is its token authentication,
    which it switches on for the clusters that it starts (token in `~/.ray/auth_token`).

    Args:
        config: Where the cluster is.
        min_cpus: CPU slots that a private cluster offers at least, whatever the machine has, so
            that more workers than cores share the cores instead of waiting for ever.

    Raises:
        PlacementError: No Ray answers at `config.address`.
    """
    # Ray reads these while it is imported and started; the processes that it starts inherit them.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    if ray.is_initialized():
        yield
        return
    with signals_kept():
        if config.address is None:
            _start(max(os.cpu_count() or 1, min_cpus))
        else:
            _join(config.address)
    try:
        yield
    finally:
        ray.shutdown()


def _start(num_cpus: int) -> None:
    import ray

    ray.init(
        address="local",
        num_cpus=num_cpus,
        include_dashboard=False,
        logging_level="ERROR",
        log_to_driver=False,
        object_store_memory=OBJECT_STORE_BYTES,
    )


def _join(address: str) -> None:
    import ray

    try:
        ray.init(address=address, logging_level="ERROR", log_to_driver=False)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise PlacementError(
            f"cluster.address={address!r}: expected a running Ray cluster ({error}); start one "
            "with `ray start --head`, or leave cluster.address null for a private local one"
        ) from error
