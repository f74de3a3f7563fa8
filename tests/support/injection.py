"""Inject seeded faults into an active run: kill workers, ranks, nodes or the driver.

Victims are found by reading the files in the run's folder, as an operator would find them. A node
is a raylet with all its children, in a Ray cluster of several nodes on this machine.
"""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from cluster.run_folder.metrics_log import last_row

KINDS = ("worker", "rank", "node", "driver")


@dataclass(frozen=True)
class Fault:
    """One injected fault."""

    kind: str
    pid: int
    """Process id of the victim: worker, rank, driver, or the node's raylet."""
    at_step: int
    """Last training step that the run had reported."""


class Injector:
    """Pick victims in one run, determined by a seed, and record each fault.

    Args:
        run_dir: The run's folder.
        seed: Determines every choice, given the same processes.
        nodes: Cluster for `node` faults; None for a run on a private cluster.
    """

    def __init__(self, run_dir: Path, seed: int, nodes: Nodes | None = None) -> None:
        self.run_dir = run_dir
        self.nodes = nodes
        self.random = random.Random(seed)
        self.record: list[Fault] = []

    def strike(self, kind: str, timeout_s: float = 60.0) -> Fault:
        """Kill one victim of `kind` as soon as one is running; fail after `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        while not (pids := self.victims(kind)):
            assert time.monotonic() < deadline, f"no {kind} to kill within {timeout_s:.0f} s"
            time.sleep(0.05)
        pid = self.random.choice(pids)
        fault = Fault(kind, pid, last_step(self.run_dir))
        self.record.append(fault)
        if kind == "node":
            assert self.nodes is not None
            self.nodes.kill(pid)
        else:
            os.kill(pid, signal.SIGKILL)
        return fault

    def victims(self, kind: str) -> list[int]:
        """Return the running processes of a kind, in a fixed order.

        For "node": the raylets of the nodes that run a rank or worker.
        """
        if kind == "node":
            assert self.nodes is not None
            homes = {parent_of(pid) for pid in self.victims("rank") + self.victims("worker")}
            return [pid for pid in self.nodes.raylets() if pid in homes]
        found = {"worker": worker_pids, "rank": rank_pids, "driver": driver_pids}[kind]
        return [pid for pid in found(self.run_dir) if alive(pid)]


class Nodes:
    """The nodes, except the head, of a Ray cluster on this machine."""

    def __init__(self, cluster: Any, cpus: int) -> None:
        self._cluster = cluster
        self._cpus = cpus
        self.address: str = cluster.address

    def add(self) -> None:
        """Add a node."""
        self._cluster.add_node(num_cpus=self._cpus, wait=False)

    def raylets(self) -> list[int]:
        """Return the process ids of the nodes' raylets, sorted."""
        return sorted(_raylet(node) for node in self._cluster.worker_nodes)

    def kill(self, raylet: int) -> None:
        """Kill a node at once, with all processes that run on it."""
        tree = [psutil.Process(raylet), *psutil.Process(raylet).children(recursive=True)]
        for process in tree:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        node = next(node for node in self._cluster.worker_nodes if _raylet(node) == raylet)
        self._cluster.remove_node(node, allow_graceful=False)


@contextmanager
def ray_nodes(count: int, cpus: int) -> Iterator[Nodes]:
    """Start a Ray head without slots, and `count` nodes of `cpus` slots each."""
    from ray.cluster_utils import Cluster

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    head = {"num_cpus": 0, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    nodes = Nodes(cluster, cpus)
    try:
        for _ in range(count):
            cluster.add_node(num_cpus=cpus)
        yield nodes
    finally:
        cluster.shutdown()


def rank_pids(run_dir: Path) -> list[int]:
    """Return the process id of every trainer rank's last start, as recorded in its log."""
    starts = [
        re.findall(r"process (\d+)\n", log.read_text(errors="replace"))
        for log in sorted((run_dir / "logs").glob("rank-*.log"))
    ]
    return [int(found[-1]) for found in starts if found]


def worker_pids(run_dir: Path) -> list[int]:
    """Return the process ids of all workers, running or ended, of the current harvest."""
    folder = run_dir / "logs" / "harvest-starts"
    try:
        names = sorted(path.name for path in folder.iterdir())
    except FileNotFoundError:
        return []
    return [int(name.split("-")[-2]) for name in names]


def driver_pids(run_dir: Path) -> list[int]:
    """Return the process id of the driver that holds the run's lock; [] without a lock file."""
    lock = run_dir / "driver.lock"
    holder = lock.read_text() if lock.exists() else ""
    return [int(pid) for pid in re.findall(r"process (\d+)", holder)]


def last_step(run_dir: Path) -> int:
    """Return the last step in the metrics; 0 if there is none."""
    row = last_row(run_dir)
    return 0 if row is None else int(row["step"])


def wait_for_step(
    run_dir: Path, step: int, driver: subprocess.Popen[Any], timeout_s: float = 180
) -> None:
    """Wait until the run has reported `step`; fail if the driver ends first, or on timeout."""
    deadline = time.monotonic() + timeout_s
    while last_step(run_dir) < step:
        assert driver.poll() is None, f"driver ended with {driver.returncode} before step {step}"
        assert time.monotonic() < deadline, f"step {step} not reached within {timeout_s:.0f} s"
        time.sleep(0.05)


def alive(pid: int) -> bool:
    """Return True if a process runs; a zombie does not count as running."""
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


def parent_of(pid: int) -> int:
    """Return the parent's process id; 0 if the process has ended."""
    with suppress(psutil.NoSuchProcess):
        return int(psutil.Process(pid).ppid())
    return 0


def _raylet(node: Any) -> int:
    return int(node.all_processes["raylet"][0].process.pid)
