"""Test that a run whose driver or ranks die or hang ends with the weights of a clean run."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from activation_store import StoreWriter
from sae_core.checkpoint.folder import list_checkpoints, read_state
from sae_core.checkpoint.row_ranges import read_tensors
from tests.support.injection import rank_pids, wait_for_step
from tests.support.paths import ROOT
from tests.support.ranks import torchrun_command

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.distributed]

STEPS = 400


def command(folder: Path, *more: str) -> list[str]:
    return [
        sys.executable,
        str(ROOT / "launch.py"),
        "stage=train",
        "experiment=none",
        "name=run",
        f"runs_dir={folder}",
        f"store.path={folder.parent / 'store'}",
        "sae.n_latents=300",
        "sae.k=6",
        "sae.auxk=8",
        "sae.dead_after_tokens=20000",
        "optim.lr=2e-3",
        "train.batch_tokens=256",
        f"train.tokens={STEPS * 256}",
        f"checkpoint.every_tokens={40 * 256}",
        "store.window_items=3",
        "store.buffer_tokens=2048",
        "logging.wandb=disabled",
        "logging.every_steps=5",
        "train.threads_per_rank=1",
        *more,
    ]


def run(folder: Path, *more: str) -> str:
    done = subprocess.run(
        command(folder, *more), capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a store of synthetic activations and an undisturbed run."""
    folder = tmp_path_factory.mktemp("kills")
    rng = np.random.default_rng(0)
    directions = rng.normal(size=(128, 32)).astype(np.float32)
    writer = StoreWriter(folder / "store", {"acts": 32}, dtype="float32", shard_tokens=1024)
    for item in range(14):
        weights = rng.random((1024, 128)) * (rng.random((1024, 128)) < 0.05)
        writer.write_item(item, (weights @ directions).astype(np.float32))
    writer.finalise()
    run(folder / "clean", "parallel.latent=2")
    return folder


def final(folder: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    newest = list_checkpoints(folder / "run" / "checkpoints")[0]
    assert read_state(newest).step == STEPS
    return newest, read_tensors(newest / "weights") | read_tensors(newest / "optimizer")


def assert_same_end(one: Path, other: Path) -> None:
    a, b = final(one)[1], final(other)[1]
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert torch.equal(tensor, b[name]), name


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 90
    while not condition():
        assert process.poll() is None, "ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)


def start(folder: Path, *more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command(folder, *more), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def test_a_killed_driver(folder):
    mine = folder / "driver"
    process = start(mine, "parallel.latent=2")
    wait_for_step(mine / "run", 100, process)
    process.kill()
    process.wait()
    before = [path.name for path in list_checkpoints(mine / "run" / "checkpoints")]
    assert before and before[0] != f"step-{STEPS:08d}"
    run(mine, "parallel.latent=2")
    assert_same_end(folder / "clean", mine)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank(folder, victim):
    mine = folder / f"rank-{victim}"
    process = start(mine, "parallel.latent=2")
    wait_for_step(mine / "run", 100, process)
    os.kill(rank_pids(mine / "run")[victim], signal.SIGKILL)
    output, _ = process.communicate(timeout=150)
    assert process.returncode == 0, output
    assert "a trainer rank died" in output or "a trainer rank failed" in output
    gap_s = float(re.findall(r"train: resumed after ([\d.]+) s", output)[0])
    print(f"from the failure to the first new step: {gap_s} s")
    assert gap_s < 75, "takes 15 s on an idle machine"
    assert_same_end(folder / "clean", mine)


def test_ranks_that_hang(folder):
    mine = folder / "hangs"
    process = start(mine, "parallel.latent=2", "train.hang_timeout_s=8")
    wait_for_step(mine / "run", 100, process)
    first = rank_pids(mine / "run")
    os.kill(first[1], signal.SIGSTOP)
    # Rank 0 waits for rank 1 in a collective: it reports and ends; the frozen rank is killed.
    wait_until(lambda: not set(first) & set(rank_pids(mine / "run")), process)
    log = (mine / "run" / "logs" / "rank-0.log").read_text()
    assert "no progress for 8 s" in log and "most recent call first" in log
    assert "in _train_step" in log, "the stack of the training thread is missing"
    began = log.count("process ")
    again = rank_pids(mine / "run")
    wait_until((mine / "run" / "logs" / "rank-0.heartbeat").exists, process)
    for pid in again:  # all ranks are frozen, so only the driver can notice
        os.kill(pid, signal.SIGSTOP)
    output, _ = process.communicate(timeout=150)
    assert process.returncode == 0, output
    assert "a trainer rank hung; stacks are in the logs of ranks [0]" in output
    assert re.search(r"trainer ranks \[[01](, 1)?\] are frozen: no heartbeat", output), output
    assert (mine / "run" / "logs" / "rank-0.log").read_text().count("process ") == began + 1
    assert_same_end(folder / "clean", mine)


def test_two_drivers_in_one_run(folder):
    mine = folder / "two"
    first = start(mine)
    wait_until((mine / "run" / "config.yaml").exists, first)
    second = subprocess.run(command(mine), capture_output=True, text=True, timeout=60, check=False)
    assert second.returncode == 2
    assert f"is in use by process {first.pid} on" in second.stderr
    first.kill()
    first.wait()


def test_ranks_that_keep_dying_end_the_run(folder):
    mine = folder / "again"
    process = start(mine, "cluster.max_failures=1")
    killed: set[int] = set()
    for _ in range(2):
        wait_until(lambda: bool(set(rank_pids(mine / "run")) - killed), process)
        os.kill(rank_pids(mine / "run")[0], signal.SIGKILL)
        killed.update(rank_pids(mine / "run"))
    output, _ = process.communicate(timeout=100)
    assert process.returncode == 1
    assert "trainer ranks failed 2 times" in output and "resume" in output


def torchrun(run_dir: Path, config: str) -> subprocess.CompletedProcess[str]:
    (run_dir / "logs").mkdir(parents=True)
    (run_dir / "config.yaml").write_text(config)
    return subprocess.run(
        torchrun_command(run_dir, 2),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )


def test_torchrun_gives_the_same_weights(folder):
    mine = folder / "torchrun"
    clean = (folder / "clean" / "run" / "config.yaml").read_text()
    done = torchrun(mine / "run", clean)
    assert done.returncode == 0, done.stderr
    assert f"train {STEPS}/{STEPS} 100%" in done.stdout
    assert_same_end(folder / "clean", mine)


def test_a_hanging_read_ends_ranks_without_a_driver(folder):
    mine = folder / "stuck"
    shutil.copytree(folder / "store", mine / "store")
    shard = mine / "store" / "acts" / "c.12.0"  # read only after a few dozen steps
    shard.unlink()
    os.mkfifo(shard)  # opening it never returns
    config = (folder / "clean" / "run" / "config.yaml").read_text()
    config = config.replace(str(folder / "store"), str(mine / "store"))
    config = config.replace("hang_timeout_s: 600.0", "hang_timeout_s: 5.0")
    config = config.replace("sample_tokens: 32768", "sample_tokens: 1000")
    done = torchrun(mine / "run", config)
    assert done.returncode == 1
    assert done.stderr.count("no progress for 5 s") == 2, done.stderr
    assert "in open_to_read" in done.stderr, "the stack of the reading thread is missing"
