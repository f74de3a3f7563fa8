"""Soak episodes with Ray: concurrent harvest and training; nodes and processes fail."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from activation_store import open_store, store_exists, verify_store
from foundation.errors import EXIT_PREEMPTED
from tests.fault.test_concurrent import CONCURRENT
from tests.soak.run import STEPS, Clean, Episode, Verdict, damage_checkpoints
from tests.support.damage import DAMAGES, damage_some
from tests.support.injection import (
    Injector,
    Nodes,
    alive,
    driver_pids,
    last_step,
    rank_pids,
    ray_nodes,
    worker_pids,
)
from tests.support.object_server import Proxy, make_bucket, s3_server

PATIENCE_S = 400
VICTIM_S = 10
"""Time to wait for a victim to appear; the harvest may already have ended."""
NODES = 3
SLOTS = 1
"""Slots per node: a node runs one harvest worker, and trainer ranks take no slot."""
KINDS = {
    "worker": "worker killed",
    "rank": "rank killed",
    "node": "node lost",
    "driver": "driver killed",
    "stop": "asked to stop",
    "hang": "rank hung",
}
FAULTY_REPLIES = ("drop", "500", "lost", "cut")
SHARE_OF_REPLIES = 0.05


class Driver:
    """The driver of a run, started again with the same command each time it ends.

    Args:
        episode: The episode of the run.
        argv: The command line.
    """

    def __init__(self, episode: Episode, argv: list[str]) -> None:
        self._episode = episode
        self._argv = argv
        self._log = open(episode.folder / "driver.log", "ab")  # noqa: SIM115, closed by close()
        self.process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(self._argv, stdout=self._log, stderr=self._log)

    def again(self) -> None:
        """Start the command again; the process must have ended."""
        assert self.process.returncode is not None
        self.process = self._start()

    def reached(self, step: int) -> bool:
        """Wait for a step; return False if the driver ends first."""
        deadline = time.monotonic() + PATIENCE_S
        while last_step(self._episode.run_dir) < step:
            if self.process.poll() is not None:
                return False
            assert time.monotonic() < deadline, f"step {step} not reached: {self.output()}"
            time.sleep(0.02)
        return True

    def stage(self, name: str) -> None:
        """Run one stage of the run to its end."""
        argv = [*self._argv, f"stage={name}"]
        done = subprocess.run(argv, stdout=self._log, stderr=self._log, check=False)
        assert done.returncode == 0, self.output()

    def finish(self) -> None:
        """Wait for the driver to end with exit code 0."""
        assert self.process.wait(PATIENCE_S) == 0, self.output()

    def output(self) -> str:
        """Return the end of all that the driver has printed."""
        return (self._episode.folder / "driver.log").read_text(errors="replace")[-20_000:]

    def close(self) -> None:
        """Kill the driver if it still runs."""
        self.process.kill()
        self.process.wait()
        self._log.close()


def pipeline_episode(clean: Clean, episode: Episode) -> Verdict:
    """Run an episode on a Ray cluster of several nodes on this machine."""
    with ray_nodes(NODES, SLOTS) as nodes:
        argv = clean.command(
            episode.folder,
            *CONCURRENT,
            "cluster=join",
            f"cluster.address={nodes.address}",
            "cluster.harvest_workers=2",
            "cluster.max_failures=20",
            "cluster.placement_timeout_s=60",
        )
        driver = Driver(episode, argv)
        try:
            _strikes(episode, driver, nodes)
            driver.finish()
        finally:
            driver.close()
    return clean.judge(episode.run_dir, episode.run_dir / "store")


def _strikes(episode: Episode, driver: Driver, nodes: Nodes) -> None:
    rng = episode.random
    injector = Injector(episode.run_dir, rng.randrange(2**32), nodes)
    # Workers first: the harvest ends before the training does.
    early = rng.sample(["worker", "node", "driver", "worker", "worker"], 5)
    late = rng.sample(["rank", "stop", "hang", "driver", "node"], 5)
    step = 0
    for kind in [*early, *late]:
        step = max(step, last_step(episode.run_dir)) + rng.randrange(10, 40)
        if not driver.reached(min(step, STEPS - 20)):
            break
        if not _strike(kind, episode, driver, injector):
            episode.missed[KINDS[kind]] += 1
        if kind == "node":
            nodes.add()
        if driver.process.poll() is not None:
            _damage_between_drivers(episode, driver)
            driver.again()


def _strike(kind: str, episode: Episode, driver: Driver, injector: Injector) -> bool:
    if kind == "stop":
        name = episode.random.choice(["SIGTERM", "SIGUSR1"])
        driver.process.send_signal(getattr(signal, name))
        struck = driver.process.wait(PATIENCE_S) == EXIT_PREEMPTED
        what = f"driver {name}"
    elif kind == "hang":
        pids = [pid for pid in rank_pids(episode.run_dir) if alive(pid)]
        struck = bool(pids)
        if struck:
            pid = episode.random.choice(pids)
            what = f"process {pid}"
            os.kill(pid, signal.SIGSTOP)
            struck = _until(lambda: not alive(pid), driver)
    elif _until(lambda: bool(injector.victims(kind)), driver, VICTIM_S):
        fault = injector.strike(kind)
        what, struck = f"process {fault.pid}", True
        if kind == "driver":
            driver.process.wait()
        else:
            assert _until(lambda: not alive(fault.pid), driver), driver.output()
    else:
        struck = False
    if struck:
        episode.happened(KINDS[kind], what)
    return struck


def _until(condition: Callable[[], bool], driver: Driver, patience_s: float = PATIENCE_S) -> bool:
    """Wait for a condition; return False if the driver ends first, or after `patience_s`."""
    deadline = time.monotonic() + patience_s
    while not condition():
        if driver.process.poll() is not None or time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def _damage_between_drivers(episode: Episode, driver: Driver) -> None:
    """Between two drivers, damage checkpoints and the store, then repair the store."""
    pids = [*rank_pids(episode.run_dir), *worker_pids(episode.run_dir)]
    deadline = time.monotonic() + PATIENCE_S
    while any(alive(pid) for pid in pids):  # Ray ends them when it notices the driver's end
        assert time.monotonic() < deadline, f"some processes outlive their driver: {pids}"
        time.sleep(0.1)
    damage_checkpoints(episode, most=2)
    store = episode.run_dir / "store"
    if not store_exists(store) or not open_store(store).n_items:
        return
    damaged: list[tuple[str, list[str]]] = []
    for how in episode.random.sample([*DAMAGES, "swap"], episode.random.randint(3, 4)):
        files = damage_some(_files_of(store), how, episode.random)
        damaged.append((how, [str(file.relative_to(store)) for file in files]))
    found = "\n".join(str(damage) for damage in verify_store(store))
    for how, names in damaged:
        if any(name in found for name in names):  # otherwise, the item was never committed
            episode.happened(f"store: {how}", ", ".join(names))
    driver.stage("repair")
    assert verify_store(store) == []


def _files_of(store: Path) -> list[Path]:
    """Return shards and log records, but not the header, which only a new harvest can replace."""
    return sorted([*store.glob("*/c.*"), *store.glob("_log/*/*.json")])


def link_episode(clean: Clean, episode: Episode) -> Verdict:
    """Run an episode whose store is in an object store with failing replies; kill one driver."""
    rng = episode.random
    url = f"s3://bucket/{episode.folder.name}"
    with s3_server() as port:
        make_bucket(port, "bucket")
        proxy = Proxy(port)

        def rule(method: str, path: str) -> str | None:
            if rng.random() > SHARE_OF_REPLIES:
                return None
            fault = rng.choice(FAULTY_REPLIES)
            episode.happened(f"reply: {fault}", f"{method} {path.split('?', maxsplit=1)[0]}")
            return fault

        proxy.rule = rule
        os.environ |= {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{proxy.port}",
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_REGION": "us-east-1",
        }
        driver = Driver(episode, clean.command(episode.folder, *CONCURRENT, f"store.path={url}"))
        try:
            if driver.reached(rng.randrange(20, 400)):
                pids = driver_pids(episode.run_dir)
                driver.process.kill()
                driver.process.wait()
                episode.happened(KINDS["driver"], f"process {pids}")
                driver.again()
            driver.finish()
            proxy.rule = lambda method, path: None
            return clean.judge(episode.run_dir, url)
        finally:
            driver.close()
            proxy.close()
