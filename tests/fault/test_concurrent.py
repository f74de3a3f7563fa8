"""Test concurrent harvest and training: same weights as in sequential mode, even after kills."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from activation_store import list_consumers, open_store
from sae_core.checkpoint.folder import list_checkpoints
from sae_core.checkpoint.row_ranges import read_tensors
from tests.support.injection import alive, rank_pids, wait_for_step, worker_pids
from tests.support.object_server import make_bucket, s3_server
from tests.support.paths import ROOT
from tests.support.tiny_models import save_gpt2, write_text

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.distributed]

CONCURRENT = ("cluster.mode=concurrent", "cluster.max_lead_items=5")


def command(work: Path, runs: str, *more: str) -> list[str]:
    return [
        sys.executable,
        str(ROOT / "launch.py"),
        "experiment=none",
        "name=run",
        f"runs_dir={work / runs}",
        f"cache_dir={work / 'cache'}",
        "model=hf",
        f"model.path={work / 'model'}",
        "model.hookpoints=[transformer.h.1]",
        "model.dtype=float32",
        "data=files",
        f"data.path={work / 'text.txt'}",
        "data.context_tokens=16",
        "data.tokens=9000",
        "data.heldout_fraction=0.2",
        "store.shard_tokens=512",
        "store.dtype=float32",
        "store.window_items=2",
        "store.buffer_tokens=1024",
        "sae.n_latents=64",
        "sae.k=4",
        "optim.lr=1e-3",
        "train.batch_tokens=64",
        "train.tokens=8960",
        "train.sample_tokens=4000",
        "train.threads_per_rank=1",
        "checkpoint.every_tokens=1280",
        "eval.tokens=256",
        "logging.wandb=disabled",
        "logging.every_steps=5",
        *more,
    ]


def run(work: Path, runs: str, *more: str) -> str:
    done = subprocess.run(
        command(work, runs, *more), capture_output=True, text=True, timeout=250, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a model, a text, and a run that harvests first and trains afterwards."""
    work = tmp_path_factory.mktemp("concurrent")
    save_gpt2(work / "model")
    write_text(work / "text.txt", documents=700)
    run(work, "sequential")
    return work


def final(work: Path, runs: str, step: int = 140) -> dict[str, torch.Tensor]:
    newest = list_checkpoints(work / runs / "run" / "checkpoints")[0]
    assert newest.name == f"step-{step:08d}"
    return read_tensors(newest / "weights") | read_tensors(newest / "optimizer")


def assert_same_end(work: Path, runs: str) -> None:
    expected, found = final(work, "sequential"), final(work, runs)
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, found[name]), name


def test_trains_while_it_harvests_no_further_ahead_than_allowed(work):
    process = subprocess.Popen(command(work, "both", *CONCURRENT), stdout=subprocess.DEVNULL)
    folder, leads, trained_growing = work / "both" / "run", [], False
    while process.poll() is None:
        if (folder / "store" / "zarr.json").exists():
            store = open_store(folder / "store")
            metrics = folder / "metrics.jsonl"
            rows = metrics.exists() and metrics.stat().st_size > 0
            trained_growing = trained_growing or (not store.finalised and rows)
            for state in list_consumers(folder / "store").values():
                if not store.finalised:
                    leads.append(store.n_items - state.next_item)
        time.sleep(0.05)
    assert process.returncode == 0
    assert trained_growing
    # The trainer's sample comes first: 4,000 rows need 10 items in complete windows, and up to 4
    # more have started by then. After that the limit holds.
    caught_up = next(i for i, lead in enumerate(leads) if lead <= 5)
    assert max(leads[caught_up:]) <= 5, leads
    assert max(leads) <= 16 < open_store(folder / "store").n_items, leads
    assert not list_consumers(folder / "store")  # a finished run is unregistered
    assert_same_end(work, "both")
    assert json.loads((folder / "eval" / "metrics.json").read_text())["dead_fraction"] is not None


def test_consumed_shards_are_deleted_except_those_a_checkpoint_needs(work):
    # With a limit, the harvest would make spare rows for those that it leaves out.
    no_limit = "data.max_norm_multiple=null"
    run(work, "deleted", *CONCURRENT, "cluster.retention=consumed", no_limit)
    store = open_store(work / "deleted" / "run" / "store")
    kept = list((work / "deleted" / "run" / "store" / "transformer.h.1").glob("c.*"))
    assert 0 < len(kept) < store.n_items
    assert store.read_deletion_mark().below == store.n_items - len(kept)
    assert_same_end(work, "deleted")


@pytest.mark.parametrize("victim", ["driver", "rank", "worker"])
def test_killed(work, victim):
    runs = f"killed-{victim}"
    folder = work / runs / "run"
    with open(work / f"{runs}.log", "w+") as log:
        process = subprocess.Popen(command(work, runs, *CONCURRENT), stdout=log, stderr=log)
        if victim == "worker":  # early: on a fast machine training ends soon after the harvest
            wait_for_items(folder, 3, process)
        else:
            wait_for_step(folder, 40, process)
        if victim == "driver":
            process.kill()
            process.wait()
            run(work, runs, *CONCURRENT)
        else:
            pids = worker_pids(folder) if victim == "worker" else rank_pids(folder)
            os.kill(pids[0], signal.SIGKILL)
            assert process.wait(200) == 0, Path(log.name).read_text()
    assert_same_end(work, runs)


def wait_for_items(folder: Path, n_items: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 120
    while len(list((folder / "store" / "transformer.h.1").glob("c.*"))) < n_items:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)


def test_a_store_in_an_object_store_trains_the_same(work, monkeypatch):
    with s3_server() as port:
        make_bucket(port, "bucket")
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a-very-secret-key")
        monkeypatch.setenv("AWS_REGION", "us-east-1")
        output = run(work, "objects", *CONCURRENT, "store.path=s3://bucket/a/store")
        assert "s3://bucket/a/store" in output
        output = run(work, "objects", "stage=verify", "store.path=s3://bucket/a/store")
        assert output.count("intact")
    assert_same_end(work, "objects")
    for path in (work / "objects").rglob("*.*"):
        if path.is_file():
            assert b"a-very-secret-key" not in path.read_bytes()


def test_a_harvest_that_fails_ends_the_trainer_too(work):
    runs = "failed"
    process = subprocess.Popen(
        command(work, runs, *CONCURRENT, "cluster.max_failures=0"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    wait_for_step(work / runs / "run", 10, process)
    # Every restarted worker fails at once, because the model is missing.
    moved = (work / "model").rename(work / "moved")
    try:
        for pid in worker_pids(work / runs / "run"):
            if alive(pid):
                os.kill(pid, signal.SIGKILL)
        output, _ = process.communicate(timeout=120)
    finally:
        moved.rename(work / "model")
    assert process.returncode in (1, 2), output
    assert "model" in output and "Traceback" not in output
    with open(work / runs / "run" / "ranks.lock", "a", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # no rank holds the lock any more
