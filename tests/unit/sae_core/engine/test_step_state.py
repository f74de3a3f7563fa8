"""Test that a step updates its state in place, which the replay of a CUDA graph needs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.ranks import Ranks
from tests.support.trainer_ranks import Job, SyntheticSource, config_of

pytestmark = pytest.mark.distributed


def _train(folder: str, update: str, rebound: str) -> int:
    """Train three steps; print which state the third one has moved."""
    import torch
    import torch.distributed as dist

    from sae_core.distributed.mesh import Mesh
    from sae_core.training.trainer import Trainer
    from tests.support.fake_cuda.step_state import STATE, moved, rebind, state_of

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    job = Job(folder, update=update, save_every=10**6)
    source = SyntheticSource(0, 1)
    mesh = Mesh.create("cpu", 1, 1)
    trainer = Trainer(config_of(job), mesh, source, Path(folder), 3, lambda row: None, 10**6)
    trainer.calibrate()
    engine = trainer.engine
    sae: Any = engine.sae
    own = sae.update_tokens_since_fired

    def careless(*arguments: Any) -> None:
        own(*arguments)
        if rebound:
            rebind(engine, rebound)

    sae.update_tokens_since_fired = careless
    for step in range(2):
        engine.train_step(source.rows(step), step)
    before = state_of(engine)
    values = {name: tensor.clone() for name, tensor in before.items()}
    engine.train_step(source.rows(2), 2)
    after = state_of(engine)
    assert after.keys() >= STATE, STATE - after.keys()
    for name in ("sae.W_enc", "W_dec.exp_avg", "b_dec.step", "sae.tokens_since_fired"):
        assert not torch.equal(values[name], after[name]), f"the step did not change {name}"
    print("moved:", *sorted(moved(before, after)), flush=True)
    dist.destroy_process_group()
    return 0


@pytest.mark.parametrize("update", ["fused", "dense"])
@pytest.mark.parametrize("rebound", ["", "engine.first_bad_step", "W_enc.step"])
def test_a_step_updates_its_state_in_place(tmp_path, update, rebound):
    ranks = Ranks(tmp_path, 1, _train, str(tmp_path), update, rebound)
    assert ranks.codes() == [0], ranks.logs()
    (line,) = (line for line in ranks.logs()[0].splitlines() if line.startswith("moved:"))
    assert line.split()[1:] == ([rebound] if rebound else [])
