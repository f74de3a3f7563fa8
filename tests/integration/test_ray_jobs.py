"""Test a run as a Ray job: submitted through the Jobs API, stopped, submitted again."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from activation_store import StoreWriter
from cluster.jobs import ray_jobs
from cluster.run_folder.metrics_log import logged_rows
from sae_core.checkpoint.folder import list_checkpoints
from tests.support.injection import last_step
from tests.support.paths import ROOT

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(400)]

BATCH, STEPS, EVERY = 64, 3000, 400


def free_ports(n: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(n)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


@pytest.fixture
def dashboard(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Start a separate Ray, yield the address of its dashboard, and kill all its processes."""
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
    port, page, agent = free_ports(3)
    folder = tempfile.mkdtemp(prefix="jobs-api-", dir="/tmp")
    command = [
        *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"),
        *("--node-ip-address=127.0.0.1", f"--port={port}", f"--temp-dir={folder}"),
        *("--include-dashboard=true", "--dashboard-host=127.0.0.1", f"--dashboard-port={page}"),
        *(f"--dashboard-agent-listen-port={agent}", "--num-cpus=2"),
        *("--min-worker-port=0", "--max-worker-port=0", f"--object-store-memory={128 << 20}"),
    ]
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0"}
    head = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, env=environment, start_new_session=True
    )
    try:
        yield f"http://127.0.0.1:{page}"
    finally:
        os.killpg(head.pid, signal.SIGKILL)
        head.wait()
        shutil.rmtree(folder, ignore_errors=True)


def wait_for(what: Callable[[], Any], timeout_s: float = 120) -> Any:
    deadline = time.monotonic() + timeout_s
    while not (found := what()):
        assert time.monotonic() < deadline, what
        time.sleep(0.3)
    return found


def launch(folder: Path, stage: str, address: str) -> subprocess.CompletedProcess[str]:
    command = [
        *(sys.executable, str(ROOT / "launch.py"), "experiment=none", "name=job"),
        *(f"stage={stage}", f"runs_dir={folder / 'runs'}", f"cache_dir={folder / 'cache'}"),
        *(f"store.path={folder / 'store'}", "store.buffer_tokens=1024", "store.window_items=2"),
        *("sae.hookpoint=null", "sae.n_latents=64", "sae.k=4", "optim.lr=1e-3"),
        *(f"train.batch_tokens={BATCH}", f"train.tokens={BATCH * STEPS}"),
        *("train.sample_tokens=512", "train.threads_per_rank=1"),
        *(f"checkpoint.every_tokens={BATCH * EVERY}", "logging.wandb=disabled"),
        *("logging.every_steps=5", "submit=ray", "submit.stage=train", f"submit.address={address}"),
    ]
    wide = os.environ | {"COLUMNS": "250"}  # the status table must not break lines
    return subprocess.run(
        command, env=wide, capture_output=True, text=True, timeout=150, check=False
    )


def test_a_job_is_stopped_with_a_checkpoint_and_resumed(tmp_path: Path, dashboard: str) -> None:
    writer = StoreWriter(tmp_path / "store", {"acts": 16}, dtype="float32", shard_tokens=512)
    for item in range(12):
        writer.write_item(item, np.random.default_rng(item).normal(size=(512, 16)).astype("f4"))
    writer.finalise()

    def submitted() -> subprocess.CompletedProcess[str] | None:
        done = launch(tmp_path, "submit", dashboard)
        if done.returncode and "expected the dashboard of a running Ray" in done.stderr:
            return None  # Ray is still starting
        assert done.returncode == 0, done.stdout + done.stderr
        return done

    wait_for(submitted)
    run = tmp_path / "runs" / "job"
    row = json.loads((run / "submit" / "jobs.json").read_text())[-1]
    assert row["scheduler"] == "ray" and row["address"] == dashboard
    client = ray_jobs.connect(dashboard)

    def log() -> str:
        return str(client.get_job_logs(row["job"]))

    wait_for(lambda: last_step(run) > 20 or client.get_job_status(row["job"]).is_terminal())
    assert not client.get_job_status(row["job"]).is_terminal(), log()
    again = launch(tmp_path, "submit", dashboard)
    assert again.returncode == 2 and f"has job {row['job']} (RUNNING)" in again.stderr, again
    client.stop_job(row["job"])
    wait_for(lambda: client.get_job_status(row["job"]).is_terminal())
    saved = int(list_checkpoints(run / "checkpoints")[0].name.removeprefix("step-"))
    assert 20 < saved < STEPS and saved % EVERY, saved  # saved by the signal, not by the cadence
    status = launch(tmp_path, "status", dashboard)
    assert f"{row['job']} STOPPED; rerun stage=submit to resume" in " ".join(status.stdout.split())

    assert launch(tmp_path, "submit", dashboard).returncode == 0
    row = json.loads((run / "submit" / "jobs.json").read_text())[-1]
    wait_for(lambda: client.get_job_status(row["job"]).is_terminal())
    assert client.get_job_status(row["job"]).value == "SUCCEEDED", log()
    steps = [row["step"] for row in logged_rows(run)]
    assert steps.count(5) == 1, "restarted without the checkpoint"
    assert list_checkpoints(run / "checkpoints")[0].name == f"step-{STEPS:08d}"


def test_a_missing_ray_is_an_error(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    done = launch(tmp_path, "submit", f"http://127.0.0.1:{port}")
    assert done.returncode == 1 and "expected the dashboard of a running Ray" in done.stderr
