"""Test that the trainer lets kernels prepare for its shapes, once and before the first step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.ranks import Ranks
from tests.support.trainer_ranks import BATCH, N_LATENTS, D, Job, SyntheticSource, config_of

pytestmark = pytest.mark.distributed


def test_kernels_are_prepared_for_the_shapes_of_this_rank(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path / "ranks", 4, _train, str(tmp_path))
    assert ranks.codes() == [0] * 4, ranks.logs()
    prepared = [BATCH // 2, N_LATENTS // 2, D, 6]
    for log in ranks.logs():
        assert f"calls {['prepare', *prepared]}, then 20 steps\n" in log, ranks.logs()


def _train(folder: str) -> int:
    import torch.distributed as dist

    from sae_core.distributed.mesh import Mesh
    from sae_core.kernels.stock.body import StockKernels
    from sae_core.training.lockstep import train_to_end
    from sae_core.training.trainer import Trainer

    calls: list[Any] = []

    class PreparedKernels(StockKernels):
        def prepare(self, n_rows: int, n_latents: int, d_model: int, k: int) -> None:
            calls.extend(["prepare", n_rows, n_latents, d_model, k])
            assert trainer.step == 0

    dist.init_process_group("gloo")
    mesh = Mesh.create("cpu", 2, 2)
    source = SyntheticSource(mesh.data_rank, mesh.n_data)
    config = config_of(Job(folder, steps=20))
    checkpoints = Path(folder) / "checkpoints"
    checkpoints.mkdir(exist_ok=True)
    trainer = Trainer(config, mesh, source, checkpoints, 3, lambda row: None, 1)
    trainer.engine.sae.kernels.__class__ = PreparedKernels
    trainer.calibrate()
    assert not calls
    train_to_end(trainer)
    print(f"calls {calls}, then {trainer.step} steps")
    dist.barrier()
    dist.destroy_process_group()
    return 0
