"""Start a private Ray cluster, or join the one at `cluster.address`."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from cluster.errors import PlacementError
from cluster.preemption import signals_kept
from conf.schema.cluster import ClusterConfig

OBJECT_STORE_BYTES = 128 << 20
"""Size of Ray's object store. It is small, because only row counts and metrics pass through Ray,
and activations do not."""

_SHORT_FOLDER = "/tmp"
_MAX_FOLDER_BYTES = 107 - len(
    "/ray/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store"
)
"""Longest temporary folder in which the paths of Ray's sockets have at most 107 bytes."""


@contextmanager
def ray_session(config: ClusterConfig, min_cpus: int = 1) -> Iterator[None]:
    """Connect to a Ray cluster for the duration of the block.

    If this process is already connected to Ray, do nothing. If `config.address` is set, join that
    cluster and disconnect at the end. Otherwise start a private cluster, without dashboard, usage
    statistics or log forwarding, that ends with the block or with this process. Ray listens on all
    network interfaces, whichever address it is given. Other users are kept out by Ray's token
    authentication, which Ray enables for clusters that it starts (token in `~/.ray/auth_token`).

    Args:
        config: Settings of the cluster.
        min_cpus: Minimum number of CPU slots in a private cluster. It may exceed the machine's
            number of cores. Workers then share the cores instead of waiting forever for a slot.

    Raises:
        PlacementError: If no Ray cluster answers at `config.address`.
    """
    # Ray reads these variables when it is imported and started. The processes that it starts
    # inherit them.
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
        _temp_dir=_short_temporary_folder(),
    )


def _short_temporary_folder() -> str | None:
    """Return a folder for Ray's sockets if the usual one has too long a path, otherwise None.

    The system limits the length of a socket's path. Ray would fail with an error about it.
    """
    usual = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or _SHORT_FOLDER
    if len(os.fsencode(usual)) <= _MAX_FOLDER_BYTES:
        return None
    print(
        f"ray: {usual} is too long for the paths of Ray's sockets (at most {_MAX_FOLDER_BYTES} "
        f"bytes); Ray uses {_SHORT_FOLDER}/ray",
        file=sys.stderr,
    )
    return f"{_SHORT_FOLDER}/ray"


def _join(address: str) -> None:
    import ray

    try:
        ray.init(address=address, logging_level="ERROR", log_to_driver=False)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise PlacementError(
            f"cluster.address={address!r}: expected a running Ray cluster ({error}); start one "
            "with `ray start --head`, or leave cluster.address null for a private local one"
        ) from error
