"""Test that no step of training waits for the accelerator through DeepSpeed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.ranks import Ranks
from tests.support.trainer_ranks import BATCH, Job, SyntheticSource, config_of

pytestmark = pytest.mark.distributed

STEPS = 6
"""DeepSpeed's throughput timer starts with the third step."""


def _count(folder: str, update: str) -> int:
    """Train `STEPS` steps; return the number of times the accelerator was synchronised."""
    import torch
    import torch.distributed as dist
    from deepspeed.accelerator import get_accelerator

    from sae_core.distributed.mesh import Mesh
    from sae_core.training.trainer import Trainer

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    calls: list[str] = []
    accelerator: Any = get_accelerator()
    job = Job(folder, update=update, save_every=10**6)
    source = SyntheticSource(0, 1)
    mesh = Mesh.create("cpu", 1, 1)
    trainer = Trainer(config_of(job), mesh, source, Path(folder), 3, lambda row: None, 10**6)
    trainer.calibrate()
    accelerator.synchronize = lambda *_: calls.append("synchronize")
    torch.cuda.synchronize = lambda *_: calls.append("torch.cuda.synchronize")
    for step in range(STEPS):
        trainer.engine.train_step(source.rows(step), step)
    accelerator.synchronize()
    assert calls.pop() == "synchronize", "the counter does not count"
    print(f"synchronised {len(calls)} times over {STEPS * BATCH} tokens", flush=True)
    dist.destroy_process_group()
    return len(calls)


@pytest.mark.parametrize("update", ["fused", "dense"])
def test_a_step_never_synchronises_the_accelerator(tmp_path, update):
    rank = Ranks(tmp_path, 1, _count, str(tmp_path), update)
    assert rank.codes() == [0], rank.logs()
