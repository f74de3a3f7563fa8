"""Test the learning rate, gradient clipping and skipped steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sae_core.config import OptimConfig
from sae_core.engine.adam import ShardedAdam
from sae_core.engine.lr_schedule import lr_at


def test_lr_schedule():
    config = OptimConfig(lr=1.0, warmup_tokens=100, decay_tokens=200)
    assert [lr_at(config, 4096, t, 1000) for t in (0, 50, 100, 500, 800, 900, 1000)] == (
        pytest.approx([0, 0.5, 1, 1, 1, 0.5, 0])
    )
    assert lr_at(OptimConfig(), 2**14, 0, 10) == pytest.approx(2e-4)
    assert lr_at(OptimConfig(), 2**16, 0, 10) == pytest.approx(1e-4)


class Bare(torch.nn.Module):
    """The attributes of an SAE that the optimiser needs."""

    def __init__(self, parameters):
        super().__init__()
        self.b_dec = parameters[0]
        self.more = torch.nn.ParameterList(parameters[1:])
        self.latent_group = None


def adam(parameters, clip_norm):
    sae: Any = Bare(parameters)
    return ShardedAdam(sae, 0.1, OptimConfig(eps=1e-8), clip_norm)


@pytest.mark.parametrize("clip_norm", [0.0, 0.5, 100.0])
def test_steps_are_those_of_torch_adam_with_clipping(clip_norm):
    generator = torch.Generator().manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(n, generator=generator)) for n in (3, 5)]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    optimizer, expected = adam(ours, clip_norm), torch.optim.Adam(theirs, lr=0.1, eps=1e-8)
    for _ in range(5):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn(a.shape, generator=generator)
            b.grad = a.grad.clone()
        if clip_norm:
            norm = torch.nn.utils.clip_grad_norm_(theirs, clip_norm)
        optimizer.step()
        expected.step()
        if clip_norm:
            torch.testing.assert_close(optimizer._global_grad_norm, norm)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("how", ["flag", "nan gradient"])
def test_a_bad_step_and_all_later_ones_change_nothing(how):
    parameter = torch.nn.Parameter(torch.ones(4))
    optimizer = adam([parameter], 1.0)
    parameter.grad = torch.ones(4)
    optimizer.step()
    before = parameter.detach().clone()
    state = {k: v.clone() for k, v in optimizer.state[parameter].items()}
    if how == "flag":
        optimizer.found_inf = torch.ones(())
    parameter.grad = torch.full((4,), float("nan") if how == "nan gradient" else 1.0)
    optimizer.step()
    parameter.grad = torch.ones(4)
    optimizer.step()
    assert torch.equal(parameter.detach(), before)
    assert all(torch.equal(v, state[k]) for k, v in optimizer.state[parameter].items())
