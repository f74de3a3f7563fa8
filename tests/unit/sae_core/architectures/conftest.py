"""A mesh of one rank, for SAEs in training that this process holds alone."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch.distributed as dist

from benchmarks.harness.one_rank import start_one_rank
from sae_core.distributed.mesh import Mesh


@pytest.fixture
def mesh(monkeypatch: pytest.MonkeyPatch) -> Iterator[Mesh]:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "DS_ACCELERATOR", "MASTER_ADDR"):
        monkeypatch.setenv(name, "")  # `start_one_rank` sets them; this removes them afterwards
    monkeypatch.setenv("MASTER_PORT", "")
    start_one_rank()
    yield Mesh.create("cpu", 1, 1)
    dist.destroy_process_group()
