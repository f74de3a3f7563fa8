"""Test JumpReLU's gradients, penalty, warm-up and start against explicit formulas."""

from __future__ import annotations

import pytest
import torch

from sae_core.architectures.jumprelu.inference import JumpReLUInference
from sae_core.architectures.jumprelu.settings import JumpReLUConfig
from sae_core.architectures.jumprelu.training import JumpReLUSAE, jumprelu, step_function
from sae_core.distributed.mesh import Mesh
from sae_core.kernels import get_kernels

D, L, B = 6, 40, 64


def make(mesh: Mesh, **settings: object) -> JumpReLUSAE:
    config = JumpReLUConfig(n_latents=L, dead_after_tokens=1, **settings)  # type: ignore[arg-type]
    config = config.resolved(D, B, 100 * B)
    sae = JumpReLUSAE(config, D, mesh, get_kernels("stock", torch.float32), 0)
    sae.begin_step(100 * B)
    return sae


def rows(seed: int = 1) -> torch.Tensor:
    return torch.randn(B, D, generator=torch.Generator().manual_seed(seed))


def test_the_gradients_of_the_threshold_by_hand():
    """Bandwidth 0.2 around a threshold of 1: only .95 and 1.05 are within 0.1 of it."""
    pre_acts = torch.tensor([[0.5], [0.95], [1.05], [1.5]], requires_grad=True)
    threshold = torch.tensor([1.0], requires_grad=True)
    latents = jumprelu(pre_acts, threshold, 0.2)
    assert latents[:, 0].tolist() == pytest.approx([0.0, 0.0, 1.05, 1.5])
    (latents[:, 0] * torch.tensor([1.0, 10.0, 100.0, 1000.0])).sum().backward()
    assert pre_acts.grad is not None and threshold.grad is not None
    assert pre_acts.grad[:, 0].tolist() == [0.0, 0.0, 100.0, 1000.0]
    assert threshold.grad.item() == pytest.approx(-1.0 / 0.2 * (10 + 100))

    pre_acts.grad = None
    threshold.grad.zero_()
    is_active = step_function(pre_acts, threshold, 0.2)
    assert is_active[:, 0].tolist() == [0.0, 0.0, 1.0, 1.0]
    (is_active[:, 0] * torch.tensor([1.0, 10.0, 100.0, 1000.0])).sum().backward()
    assert pre_acts.grad is None
    assert threshold.grad.item() == pytest.approx(-1 / 0.2 * (10 + 100))


def explicit_threshold_gradient(sae: JumpReLUSAE, x: torch.Tensor, dl0: float) -> torch.Tensor:
    """Return the gradient of log_threshold by equations 11 and 12 of the paper, in float64."""
    W_enc, W_dec, b_dec = sae.W_enc.double(), sae.W_dec.double(), sae.b_dec.double()
    threshold, width = sae.log_threshold.double().exp(), sae.config.bandwidth
    pre_acts = (x.double() - b_dec) @ W_enc.T + sae.b_enc
    recon = (pre_acts * (pre_acts > threshold)) @ W_dec + b_dec
    near = ((pre_acts - threshold).abs() < width / 2).double()
    through_latents = (2 * (recon - x) @ W_dec.T / x.numel()) * (-threshold / width) * near
    through_l0 = dl0 / len(x) * (-1 / width) * near
    return (through_latents + through_l0).sum(0) * threshold


@pytest.mark.parametrize("target", [None, 3.0])
def test_the_loss_and_its_gradients(mesh, target):
    sae = make(mesh, l0_coef=0.05, l0_target=target, bandwidth=0.5)
    x = rows()
    with torch.no_grad():
        sae.log_threshold.copy_((0.2 + torch.rand(L)).log())
        sae.b_enc.copy_(0.1 * torch.randn(L))
        sae.b_dec.copy_(0.3 * torch.randn(D))
    out = sae(x)
    out.loss.backward()
    pre_acts = (x - sae.b_dec) @ sae.W_enc.T + sae.b_enc
    mask = (pre_acts > sae.log_threshold.exp()).float()
    l0 = float(mask.sum()) / B
    penalty = 0.05 * l0 if target is None else 0.05 * (l0 / target - 1) ** 2
    dl0 = 0.05 if target is None else 0.05 * 2 * (l0 / target - 1) / target
    dense = ((x - (pre_acts * mask) @ sae.W_dec - sae.b_dec) ** 2).mean()
    assert out.loss.item() == pytest.approx(float(dense) + penalty, rel=1e-5)
    assert float(out.metrics["l0_penalty"]) == pytest.approx(penalty, rel=1e-5)
    assert int(out.n_active) == int(mask.sum())
    assert sae.log_threshold.grad is not None
    with torch.no_grad():
        expected = explicit_threshold_gradient(sae, x, dl0).float()
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(sae.log_threshold.grad, expected, rtol=1e-4, atol=1e-6)
    # All other gradients are those of the squared error with a fixed mask.
    names = ("W_enc", "b_enc", "b_dec", "W_dec")
    gradients = torch.autograd.grad(dense, [getattr(sae, name) for name in names])
    wanted = dict(zip(names, gradients, strict=True))
    along = (wanted["W_dec"] * sae.W_dec).sum(1, keepdim=True)
    wanted["W_dec"] = wanted["W_dec"] - along * sae.W_dec  # projected
    for name in names:
        torch.testing.assert_close(getattr(sae, name).grad, wanted[name], rtol=1e-4, atol=1e-6)


def test_the_penalty_warms_up(mesh):
    sae = make(mesh, l0_coef=0.05, penalty_warmup_tokens=1000)
    for tokens, share in ((0, 0.0), (250, 0.25), (1000, 1.0), (5000, 1.0)):
        sae.begin_step(tokens)
        out = sae(rows())
        l0 = float(out.n_active) / B
        assert float(out.metrics["l0_penalty"]) == pytest.approx(share * 0.05 * l0)
    assert JumpReLUConfig().resolved(D, 10, 700).penalty_share(7) == pytest.approx(0.1)
    assert JumpReLUConfig(penalty_warmup_tokens=0).resolved(D, 10, 700).penalty_share(0) == 1.0


def test_all_latents_start_equally_active(mesh):
    sae = make(mesh, initial_l0=10.0)
    x = torch.randn(400, D, generator=torch.Generator().manual_seed(0))
    sae.calibrate_encoder(x)
    active = sae.encode_centred(x - sae.b_dec) > 0
    assert active.sum(0).tolist() == [100] * L
    assert torch.equal(sae.threshold, sae.log_threshold.exp())
    recon = sae.reconstruct_centred(x - sae.b_dec)
    # Least squares: no multiple of the reconstructions is closer to the rows.
    assert float((recon * (x - recon)).sum() / x.square().sum()) == pytest.approx(0, abs=1e-4)


def test_inference_keeps_what_is_above_the_threshold(monkeypatch):
    W = torch.nn.functional.normalize(rows(3)[:L], dim=1)
    threshold = 0.5 + torch.rand(L)
    config = JumpReLUConfig(n_latents=L)
    sae = JumpReLUInference(config, W, W, 0.1 * torch.ones(L), torch.zeros(D), threshold=threshold)
    x = rows(4)
    pre_acts = x @ W.T + 0.1
    expected = pre_acts * (pre_acts > threshold)
    values, _ = sae.encode_topk(x)
    assert values.shape[1] == int((expected > 0).sum(1).max())
    assert (values.diff(dim=1) <= 0).all()
    torch.testing.assert_close(sae.encode(x), expected)
    monkeypatch.setattr("sae_core.architectures.penalty.inference._BLOCK_ELEMENTS", 7 * L)
    in_blocks = sae.encode_topk(x)
    torch.testing.assert_close(in_blocks[0], values)
    torch.testing.assert_close(sae(x), expected @ W)
    none = sae.encode_topk(torch.zeros(3, D))  # no latent is active
    assert none[0].shape == (3, 0)
    torch.testing.assert_close(sae(torch.zeros(3, D)), torch.zeros(3, D))
    assert sae.encode_topk(x[:0])[0].shape == (0, 0)
