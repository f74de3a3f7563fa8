"""Test the losses of Gated SAEs, the frozen decoder of the auxiliary loss, and their gradients."""

from __future__ import annotations

import pytest
import torch

from sae_core.architectures.gated.inference import GatedInference
from sae_core.architectures.gated.settings import GatedConfig
from sae_core.architectures.gated.training import GatedSAE
from sae_core.distributed.mesh import Mesh
from sae_core.kernels import get_kernels


def make(mesh: Mesh, n_latents: int, d_model: int) -> GatedSAE:
    config = GatedConfig(n_latents=n_latents, l1_coef=0.5, dead_after_tokens=1)
    config = config.resolved(d_model, 1, 1000)
    sae = GatedSAE(config, d_model, mesh, get_kernels("stock", torch.float32), 0)
    sae.begin_step(1000)
    return sae


def test_the_loss_by_hand(mesh):
    """Row (3, 1): gates 3 - 1 = 2 and 0; magnitude 2 * 3 + 0.5 = 6.5; the second is closed."""
    sae = make(mesh, 2, 2)
    with torch.no_grad():
        sae.W_enc.copy_(torch.eye(2))
        sae.W_dec.copy_(torch.eye(2))
        sae.b_enc.copy_(torch.tensor([-1.0, -5.0]))
        sae.r_mag.copy_(torch.tensor([2.0, 2.0]).log())
        sae.b_mag.copy_(torch.tensor([0.5, 0.5]))
    out = sae(torch.tensor([[3.0, 1.0]]))
    assert float(out.squared_error) == pytest.approx(3.5**2 + 1)
    assert float(out.metrics["gate_loss"]) == pytest.approx((1 + 1) / 2)  # gates give (2, 0)
    assert float(out.metrics["l1_penalty"]) == pytest.approx(0.5 * 2 / 2)
    assert out.loss.item() == pytest.approx((3.5**2 + 1) / 2 + 1 + 0.5)
    assert out.fired.tolist() == [True, False]
    sae.begin_step(25)  # a quarter of the warm-up of 100 tokens; the gates' error is not a penalty
    out = sae(torch.tensor([[3.0, 1.0]]))
    assert float(out.metrics["l1_penalty"]) == pytest.approx(0.5 * 2 / 2 / 4)
    assert float(out.metrics["gate_loss"]) == pytest.approx(1)


def test_the_gradients(mesh):
    sae = make(mesh, 30, 6)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(16, 6, generator=generator)
    names = ("W_enc", "b_enc", "W_dec", "b_dec", "r_mag", "b_mag")
    with torch.no_grad():
        for name in ("b_enc", "b_dec", "r_mag", "b_mag"):
            parameter = getattr(sae, name)
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    sae(x).loss.backward()
    W_enc, b_enc, W_dec, b_dec, r_mag, b_mag = (
        getattr(sae, name).detach().requires_grad_() for name in names
    )
    p = (x - b_dec) @ W_enc.T
    gate = (p + b_enc).relu()
    latents = (gate > 0) * (p * r_mag.exp() + b_mag).relu()
    loss = (x - latents @ W_dec - b_dec).square().mean() + 0.5 * gate.sum() / x.numel()
    loss = loss + (x - gate @ W_dec.detach() - b_dec.detach()).square().mean()
    wanted = dict(
        zip(
            names,
            torch.autograd.grad(loss, (W_enc, b_enc, W_dec, b_dec, r_mag, b_mag)),
            strict=True,
        )
    )
    along = (wanted["W_dec"] * W_dec).sum(1, keepdim=True)
    wanted["W_dec"] = wanted["W_dec"] - along * W_dec
    for name, gradient in wanted.items():
        torch.testing.assert_close(getattr(sae, name).grad, gradient, rtol=1e-4, atol=1e-6)


def test_inference_has_the_values_and_gradients_of_the_dense_definition():
    torch.manual_seed(0)
    W_dec, b_dec = torch.randn(20, 6), torch.randn(6)
    W_enc, b_enc, r_mag, b_mag = (torch.randn(20, 6), *(0.5 * torch.randn(3, 20)))
    config = GatedConfig(n_latents=20)
    sae = GatedInference(config, W_enc, W_dec, b_enc, b_dec, r_mag=r_mag, b_mag=b_mag)
    parameters = [sae.W_enc, sae.b_dec, sae.r_mag, sae.b_mag]
    for parameter in parameters:
        parameter.requires_grad_()
    x = torch.randn(5, 6, requires_grad=True)
    p = (x - sae.b_dec) @ sae.W_enc.T
    latents = (p + b_enc > 0) * (p * sae.r_mag.exp() + sae.b_mag).relu()
    torch.testing.assert_close(sae.encode(x), latents)
    with torch.no_grad():
        torch.testing.assert_close(sae.encode(x), latents.detach())
    wanted = torch.autograd.grad((latents @ W_dec).sin().sum(), [x, *parameters])
    found = torch.autograd.grad((sae(x) - sae.b_dec).sin().sum(), [x, *parameters])
    for name, a, b in zip(("x", "W_enc", "b_dec", "r_mag", "b_mag"), found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=name)
