"""Test that the encoder starts at the scale with the smallest squared error."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.ranks import Ranks
from tests.support.trainer_ranks import Job, SyntheticSource, config_of

pytestmark = pytest.mark.distributed


def _calibrate(folder: str, latent: int) -> int:
    """Calibrate; print the squared error at the scale found, at its neighbours and at none."""
    import torch
    import torch.distributed as dist

    from sae_core.distributed.mesh import Mesh
    from sae_core.training.trainer import Trainer

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    job = Job(folder, latent, save_every=10**6)
    source = SyntheticSource(0, 1)
    mesh = Mesh.create("cpu", latent, 1)
    trainer = Trainer(config_of(job), mesh, source, Path(folder), 3, lambda row: None, 10**6)
    trainer.calibrate()
    sae = trainer.engine.sae
    centred = sae.normalise(source.sample(480)) - sae.b_dec
    found = sae.W_enc.detach().clone()
    errors = []
    for factor in (1.0, 0.98, 1.02, 0.0):
        sae.W_enc.data.copy_(found * factor)
        errors.append(float((centred - sae.reconstruct_centred(centred)).square().sum()))
    if dist.get_rank() == 0:
        print("errors:", *errors, flush=True)
    dist.destroy_process_group()
    return 0


@pytest.mark.parametrize("latent", [1, 2])
def test_the_start_has_the_smallest_error(tmp_path, latent):
    ranks = Ranks(tmp_path, latent, _calibrate, str(tmp_path), latent)
    assert ranks.codes() == [0] * latent, ranks.logs()
    (line,) = [line for line in ranks.logs()[0].splitlines() if line.startswith("errors:")]
    found, below, above, without = map(float, line.split()[1:])
    assert found < below and found < above
    assert found < 0.9 * without
