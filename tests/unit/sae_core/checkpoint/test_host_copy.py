"""Test how much host memory a save takes: the number of blocks, and the measured peak."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from sae_core.checkpoint.background_saver import _Background
from sae_core.checkpoint.host_copy import BLOCK_BYTES, FEWEST_BLOCKS, blocks_for
from tests.support.ranks import Ranks

MIB, GIB = 2**20, 2**30
INF = float("inf")


@pytest.mark.parametrize(
    ("n_bytes", "share_bytes", "blocks"),
    [
        (96 * GIB, INF, 1536),
        (96 * GIB, 192 * GIB, 1536),  # half of the memory is just enough
        (96 * GIB, 128 * GIB, 1024),  # 1M x 4096 on one GPU of a 128-GiB host
        (96 * GIB, 0.0, FEWEST_BLOCKS),
        (BLOCK_BYTES + 1, INF, 2),
        (1, 0.0, 1),
        (0, INF, 0),
    ],
)
def test_blocks_fill_at_most_half_of_the_memory(n_bytes, share_bytes, blocks):
    size = max(1, min(BLOCK_BYTES, n_bytes))
    assert blocks_for(n_bytes, size, share_bytes) == blocks


def test_the_writing_thread_uses_the_ranks_own_device(monkeypatch):
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    thread = _Background(lambda: chosen.append(torch.device("cpu")), torch.device("cuda", 3))
    thread.start()
    thread.join()
    assert thread.error is None
    assert chosen == [torch.device("cuda", 3), torch.device("cpu")]  # before it does anything


def test_pinned_blocks_are_not_rounded_up():
    assert BLOCK_BYTES & (BLOCK_BYTES - 1) == 0  # torch rounds up to a power of two


L, D = 16384, 512
MATRIX = L * D * 4
TOTAL = 6 * MATRIX
"""Weights and moments; all other tensors are small."""
SLACK = 20 * MIB
"""Memory of threads, files and gloo."""


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def _save(folder: str, asynchronous: bool, short: bool, most_bytes: int) -> int:
    """Save once in a separate process; return 0 if the peak is at most `most_bytes` higher."""
    import torch.distributed as dist

    from sae_core.architectures.registry import build_sae
    from sae_core.checkpoint import CheckpointSaver, CheckpointState, host_copy
    from sae_core.config import CheckpointConfig, ParallelConfig, TopKConfig, TrainerConfig
    from sae_core.distributed.mesh import Mesh
    from sae_core.engine.deepspeed_engine import SAEEngine
    from sae_core.kernels.registry import get_kernels

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    patched: Any = host_copy
    patched.BLOCK_BYTES = 4 * MIB
    patched.available_bytes = lambda: 0 if short else 4 * TOTAL
    config = TrainerConfig(TopKConfig(n_latents=L, k=4), parallel=ParallelConfig())
    mesh = Mesh.create("cpu", 1, 1)
    device = torch.device("cpu")
    kernels: Any = get_kernels("stock", torch.float32)
    engine = SAEEngine("sae", build_sae(config.sae, D, mesh, kernels, 0), config, device)
    engine.moments()["W_enc"]["exp_avg"].fill_(1.0)
    for moments in engine.moments().values():
        for moment in moments.values():
            moment.add_(1.0)  # touch all pages
    settings = CheckpointConfig(asynchronous=asynchronous)
    saver = CheckpointSaver(Path(folder), settings, mesh, device, 1)
    state = CheckpointState(1, 1, 1, "x", 0, 1, D, {"sae": {}}, {})
    Path("/proc/self/clear_refs").write_text("5")  # restart the count of VmHWM
    before = _status("VmRSS")
    saver.save(engine, state)
    saver.wait()
    grown = _status("VmHWM") - before
    print(f"grown by {grown / MIB:.1f} MiB, of at most {most_bytes / MIB:.1f}", flush=True)
    dist.destroy_process_group()
    return 0 if grown <= most_bytes else 1


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(
    ("asynchronous", "short", "most_bytes"),
    [
        (True, False, TOTAL + SLACK),
        (True, True, 2 * 4 * MIB + SLACK),
        (False, False, SLACK),  # the tensors themselves are written
    ],
)
def test_a_save_takes_the_memory_of_its_blocks_only(tmp_path, asynchronous, short, most_bytes):
    rank = Ranks(tmp_path, 1, _save, str(tmp_path / "checkpoints"), asynchronous, short, most_bytes)
    assert rank.codes() == [0], rank.logs()
    print(rank.logs()[0])
