"""Test which inputs dead latents take, what becomes of their rows, and of Adam's moments."""

from __future__ import annotations

import pytest
import torch

from sae_core.architectures.relu.resampling import _draw, resample_dead
from sae_core.architectures.relu.settings import ReLUConfig
from sae_core.architectures.relu.training import ReLUSAE
from sae_core.config import OptimConfig, ParallelConfig, TrainConfig, TrainerConfig
from sae_core.engine.deepspeed_engine import SAEEngine
from sae_core.kernels import get_kernels

L, D, B = 12, 6, 32
DEAD = [1, 5, 6, 11]


def config(**settings: object) -> ReLUConfig:
    return ReLUConfig(n_latents=L, dead_after_tokens=4 * B, **settings)  # type: ignore[arg-type]


def make(mesh) -> ReLUSAE:
    sae = ReLUSAE(config(), D, mesh, get_kernels("stock", torch.float32), 0)
    with torch.no_grad():
        sae.b_dec.fill_(0.5)
        sae.b_enc.fill_(0.1)
        sae.W_enc.mul_(3.0)
    sae.tokens_since_fired[DEAD] = 4 * B
    return sae


def test_dead_latents_take_inputs_of_high_loss(mesh):
    sae = make(mesh)
    before = {name: p.detach().clone() for name, p in sae.named_parameters()}
    x, losses = torch.randn(B, D), torch.full((B,), 1e-6)
    worst = [3, 8, 20, 31]
    losses[worst] = 1.0
    replaced = resample_dead(sae, x, losses, "seed")
    assert replaced.nonzero().flatten().tolist() == DEAD
    directions = torch.nn.functional.normalize(x[worst] - 0.5, dim=1)
    cosines = sae.W_dec[DEAD] @ directions.T
    assert sorted(cosines.argmax(1).tolist()) == [0, 1, 2, 3]  # each input once
    torch.testing.assert_close(cosines.max(1).values, torch.ones(4))
    torch.testing.assert_close(sae.W_enc[DEAD], 0.2 * 3.0 * sae.W_dec[DEAD])
    assert not sae.b_enc[DEAD].any() and not sae.tokens_since_fired[DEAD].any()
    alive = [i for i in range(L) if i not in DEAD]
    for name in ("W_enc", "W_dec", "b_enc"):
        assert torch.equal(getattr(sae, name)[alive], before[name][alive])


def test_fewer_inputs_than_dead_latents(mesh):
    sae = make(mesh)
    replaced = resample_dead(sae, torch.randn(2, D), torch.ones(2), "seed")
    assert replaced.nonzero().flatten().tolist() == DEAD[:2]
    sae.tokens_since_fired.zero_()
    assert not resample_dead(sae, torch.randn(2, D), torch.ones(2), "seed").any()


def test_inputs_are_drawn_by_squared_loss():
    losses = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    counts = torch.zeros(3)
    for i in range(2000):
        counts[_draw(losses, 1, str(i))] += 1
    assert (counts / 2000).tolist() == pytest.approx([1 / 14, 4 / 14, 9 / 14], abs=0.04)


@pytest.mark.parametrize("zero", [0, 1])
def test_the_engine_forgets_the_moments_of_replaced_rows_only(mesh, zero):
    settings = config(resample_every_tokens=2 * B, l1_coef=0.0).resolved(D, B, 100 * B)
    trainer = TrainerConfig(
        settings, OptimConfig(lr=1e-3), TrainConfig(100 * B, B), ParallelConfig(1, 1, zero)
    )
    sae = ReLUSAE(settings, D, mesh, get_kernels("stock", torch.float32), 0)
    engine = SAEEngine("sae", sae, trainer, torch.device("cpu"))
    for step in range(2):
        engine.train_step(torch.randn(B, D), step)
    with torch.no_grad():
        sae.b_enc[DEAD] = -100.0  # they do not fire in the step that resamples
        engine.sync_edited_parameters()
    sae.tokens_since_fired[DEAD] = 4 * B
    engine.train_step(torch.randn(B, D), 2)
    for name in ("W_enc", "W_dec", "b_enc"):
        assert not sae.get_parameter(name)[DEAD].eq(-100.0).any()
        for moment in engine.moments_of(name).values():
            rows = moment.reshape(L, -1).abs().amax(1)
            assert not rows[DEAD].any() and (rows > 0).sum() == L - len(DEAD), name
    assert all(moment.any() for moment in engine.moments_of("b_dec").values())
    encoder = sae.W_enc.detach().clone()
    engine.train_step(torch.randn(B, D), 3)  # ZeRO 1 must not restore the rows
    assert (sae.W_enc - encoder).abs().max() < 0.1


def test_the_schedule():
    settings = config(resample_every_tokens=100, resample_until_tokens=250).resolved(D, 30, 1000)
    assert settings.resample_every_tokens == 120  # whole batches
    assert [t for t in range(0, 1000, 30) if settings.resamples_at(t)] == [120, 240]
    settings = config(resample_every_tokens=100, resample_warmup_tokens=40).resolved(D, 10, 400)
    assert settings.resample_until_tokens == 300
    shares = [settings.lr_share(tokens) for tokens in range(90, 160, 10)]
    assert shares == pytest.approx(
        [1, 1, 0.1 + 0.9 * 0.146447, 0.55, 0.1 + 0.9 * 0.853553, 1, 1], abs=1e-5
    )
    assert settings.lr_share(310) < 0.3 and settings.lr_share(410) == 1.0
    assert config().resolved(D, 10, 400).lr_share(110) == 1.0
