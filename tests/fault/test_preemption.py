"""Test SIGTERM, SIGUSR1 and Ctrl-C: a last checkpoint, exit code 75, and resuming."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from activation_store import StoreWriter, open_store, store_exists
from cluster.run_folder.saved_config import save_config
from conf.schema.run import RunConfig
from foundation.errors import EXIT_PREEMPTED
from sae_core.checkpoint.folder import list_checkpoints, newest_valid, step_of
from sae_core.checkpoint.row_ranges import read_tensors
from sae_core.config import CheckpointConfig, OptimConfig, ParallelConfig, TopKConfig, TrainConfig
from tests.support.paths import ROOT
from tests.support.ranks import Ranks, cluster_rank, torchrun_command
from tests.support.tiny_models import save_gpt2, write_text

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

STEPS, BATCH = 600, 256
PIPES: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}


def make_run(folder: Path, grace_s: float = 60.0) -> Path:
    """Make a run folder with its config; the store is in the parent of `folder`."""
    run_dir = folder / "run"
    (run_dir / "logs").mkdir(parents=True)
    config = RunConfig(
        name="run",
        stage="train",
        runs_dir=str(folder),
        sae=TopKConfig(n_latents=300, k=6, auxk=8, dead_after_tokens=20000),
        optim=OptimConfig(lr=2e-3),
        train=TrainConfig(STEPS * BATCH, BATCH, sample_tokens=2000, threads_per_rank=1),
        parallel=ParallelConfig(latent=2),
        checkpoint=CheckpointConfig(every_tokens=100 * BATCH, grace_s=grace_s),
    )
    config.store.path = str(folder.parent / "store")
    config.store.window_items, config.store.buffer_tokens = 3, 2048
    config.logging.wandb, config.logging.every_steps = "disabled", 5
    save_config(config, run_dir / "config.yaml")
    return run_dir


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a store of synthetic activations and an undisturbed run."""
    folder = tmp_path_factory.mktemp("preemption")
    rng = np.random.default_rng(0)
    directions = rng.normal(size=(128, 32)).astype(np.float32)
    writer = StoreWriter(folder / "store", {"acts": 32}, dtype="float32", shard_tokens=1024)
    for item in range(14):
        weights = rng.random((1024, 128)) * (rng.random((1024, 128)) < 0.05)
        writer.write_item(item, (weights @ directions).astype(np.float32))
    writer.finalise()
    codes, logs = ranks(make_run(folder / "clean"))
    assert codes == [0, 0], logs
    assert "6 checkpoints paused " in logs[0], "the share of the pause is not printed"
    return folder


def ranks(run_dir: Path, trap: str = "") -> tuple[list[int], list[str]]:
    group = Ranks(run_dir / "ranks", 2, _rank, str(run_dir), trap)
    return group.codes(), group.logs()


def _rank(run_dir: str, trap: str) -> int:
    """Run `python -m cluster.rank`; rank 1 gets the signals of `trap` during a save."""
    from sae_core.checkpoint import save

    real = save._hash_share

    def in_a_save(temporary: Path, names: list[str]) -> object:
        if trap and os.environ["RANK"] == "1" and "step-00000100" in temporary.name:
            os.kill(os.getpid(), getattr(signal, trap.split(maxsplit=1)[0]))
            if "again" in trap:
                time.sleep(1)
                os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1000 if "hang" in trap else 1)
        return real(temporary, names)

    save._hash_share = in_a_save  # type: ignore[assignment]
    return cluster_rank(run_dir)


def assert_same_end(one: Path, other: Path) -> None:
    tensors = []
    for run_dir in (one, other):
        newest = list_checkpoints(run_dir / "checkpoints")[0]
        assert step_of(newest) == STEPS
        parts = [read_tensors(newest / part) for part in ("weights", "optimizer")]
        tensors.append(parts[0] | parts[1])
    assert tensors[0].keys() == tensors[1].keys()
    for name, tensor in tensors[0].items():
        assert torch.equal(tensor, tensors[1][name]), name


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_signal_to_one_rank_in_the_middle_of_a_save(folder, name):
    run_dir = make_run(folder / name)
    codes, logs = ranks(run_dir, name)
    assert codes == [EXIT_PREEMPTED] * 2, logs
    assert "run the same command again to resume" in logs[0]
    newest = newest_valid(run_dir / "checkpoints")
    assert newest is not None and 100 < step_of(newest) < STEPS
    codes, logs = ranks(run_dir)
    assert codes == [0, 0], logs
    assert_same_end(folder / "clean" / "run", run_dir)


@pytest.mark.parametrize(
    ("trap", "grace_s", "said"),
    [
        ("SIGTERM hang", 2.0, "checkpoint.grace_s=2"),
        ("SIGUSR1 again hang", 600.0, "a second signal"),
    ],
)
def test_a_rank_without_time_left_exits_at_once(folder, trap, grace_s, said):
    run_dir = make_run(folder / trap.replace(" ", "-"), grace_s)
    began = time.monotonic()
    codes, logs = ranks(run_dir, trap)
    assert time.monotonic() - began < 100
    assert codes[1] == EXIT_PREEMPTED and codes[0] != 0, logs
    assert said in logs[1]
    assert list_checkpoints(run_dir / "checkpoints") == []


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 150
    while not condition():
        assert process.poll() is None, f"ended too early: {process.communicate()[0]}"
        assert time.monotonic() < deadline
        time.sleep(0.02)


def size(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0


def wait_for_growth(file: Path, before: int, process: subprocess.Popen[str]) -> None:
    wait_until(lambda: size(file) > before, process)


def start(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(ROOT / "launch.py"), *arguments]
    return subprocess.Popen(command, text=True, start_new_session=True, **PIPES)


def test_signals_to_torchrun_and_to_one_of_its_ranks(folder):
    run_dir = make_run(folder / "torchrun")
    metrics = run_dir / "metrics.jsonl"
    command = torchrun_command(run_dir, 2)
    steps = []
    for name in ("SIGTERM", "SIGUSR1"):
        before = size(metrics)
        process = subprocess.Popen(command, text=True, cwd=ROOT, **PIPES)
        wait_for_growth(metrics, before, process)
        ranks = sorted(child.pid for child in psutil.Process(process.pid).children())
        os.kill(process.pid if name == "SIGTERM" else ranks[-1], getattr(signal, name))
        output, _ = process.communicate(timeout=100)
        assert output.count("run the same command again to resume") == 2, output
        if name == "SIGUSR1":  # an agent that is stopped itself does not report its ranks
            assert re.search(rf"exitcode\s*: {EXIT_PREEMPTED}\b", output), output
        newest = newest_valid(run_dir / "checkpoints")
        assert newest is not None
        steps.append(step_of(newest))
    assert 0 < steps[0] < steps[1] < STEPS
    subprocess.run(command, check=True, timeout=150, capture_output=True, cwd=ROOT)
    assert_same_end(folder / "clean" / "run", run_dir)


@pytest.mark.ray
def test_signals_to_a_driver_and_to_its_process_group(folder):
    run_dir = make_run(folder / "driver")
    arguments = [
        "stage=train",
        "experiment=none",
        "name=run",
        f"runs_dir={folder / 'driver'}",
        f"store.path={folder / 'store'}",
        "sae.n_latents=300",
        "sae.k=6",
        "sae.auxk=8",
        "sae.dead_after_tokens=20000",
        "optim.lr=2e-3",
        f"train.batch_tokens={BATCH}",
        f"train.tokens={STEPS * BATCH}",
        "train.sample_tokens=2000",
        "train.threads_per_rank=1",
        "parallel.latent=2",
        f"checkpoint.every_tokens={10**9}",
        "store.window_items=3",
        "store.buffer_tokens=2048",
        "logging.wandb=disabled",
        "logging.every_steps=5",
    ]
    metrics = run_dir / "metrics.jsonl"
    steps = []
    # A terminal sends SIGINT to the whole process group.
    for kill, name in (
        (os.kill, signal.SIGTERM),
        (os.killpg, signal.SIGUSR1),
        (os.killpg, signal.SIGINT),
    ):
        before = size(metrics)
        process = start(*arguments)
        wait_for_growth(metrics, before, process)
        kill(process.pid, name)
        output, _ = process.communicate(timeout=100)
        assert process.returncode == EXIT_PREEMPTED, output
        assert "preempted: " in output and "run the same command again to resume" in output
        newest = newest_valid(run_dir / "checkpoints")
        assert newest is not None
        steps.append(step_of(newest))
    assert 0 < steps[0] < steps[1] < steps[2] < STEPS
    process = start(*arguments)
    output, _ = process.communicate(timeout=100)
    assert process.returncode == 0, output
    assert "checkpoints paused" in output
    assert_same_end(folder / "clean" / "run", run_dir)


@pytest.mark.ray
def test_a_signal_while_it_harvests(tmp_path):
    save_gpt2(tmp_path / "model")
    write_text(tmp_path / "text.txt", documents=700)
    arguments = [
        "stage=harvest",
        "experiment=none",
        "name=run",
        f"runs_dir={tmp_path}",
        f"cache_dir={tmp_path / 'cache'}",
        "model=hf",
        f"model.path={tmp_path / 'model'}",
        "model.hookpoints=[transformer.h.1]",
        "model.dtype=float32",
        "data=files",
        f"data.path={tmp_path / 'text.txt'}",
        "data.context_tokens=16",
        "data.tokens=9000",
        "store.shard_tokens=64",
        "store.dtype=float32",
        "train.tokens=2048",
    ]
    store = tmp_path / "run" / "store"
    process = start(*arguments)
    wait_until(lambda: store_exists(store) and open_store(store).n_items > 3, process)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == EXIT_PREEMPTED, output
    assert not open_store(store).finalised
    process = start(*arguments)
    output, _ = process.communicate(timeout=100)
    assert process.returncode == 0 and "items are already committed" in output, output
    assert open_store(store).finalised
