"""Test the loss of ReLU SAEs, both kinds of decoder norm, and their gradients."""

from __future__ import annotations

import pytest
import torch

from foundation.errors import ConfigError
from sae_core.architectures.registry import check_settings
from sae_core.architectures.relu.inference import ReLUInference
from sae_core.architectures.relu.settings import ReLUConfig
from sae_core.architectures.relu.training import ReLUSAE
from sae_core.distributed.mesh import Mesh
from sae_core.kernels import get_kernels


def make(mesh: Mesh, n_latents: int, d_model: int, **settings: object) -> ReLUSAE:
    config = ReLUConfig(n_latents=n_latents, dead_after_tokens=1, **settings)  # type: ignore[arg-type]
    config = config.resolved(d_model, 1, 1000)
    sae = ReLUSAE(config, d_model, mesh, get_kernels("stock", torch.float32), 0)
    sae.begin_step(1000)
    return sae


@torch.no_grad()
def set_weights(sae: ReLUSAE, W_enc: list[list[float]], W_dec: list[list[float]]) -> None:
    sae.W_enc.copy_(torch.tensor(W_enc))
    sae.W_dec.copy_(torch.tensor(W_dec))


@pytest.mark.parametrize(("decoder_norm", "norm"), [("unit", 1.0), ("penalty", 2.0)])
def test_the_loss_by_hand(mesh, decoder_norm, norm):
    """Row (3, 1): latents 3 and 0, reconstruction (6, 0), error (-3, 1)."""
    sae = make(mesh, 2, 2, l1_coef=0.5, decoder_norm=decoder_norm)
    set_weights(sae, [[1.0, 0.0], [0.0, -1.0]], [[2.0, 0.0], [0.0, 1.0]])
    out = sae(torch.tensor([[3.0, 1.0]]))
    l1 = 0.5 * 3 * norm / 2
    assert out.loss.item() == pytest.approx((9 + 1) / 2 + l1)
    assert float(out.metrics["l1_penalty"]) == pytest.approx(l1)
    assert float(out.squared_error) == 10 and int(out.n_active) == 1
    assert out.fired.tolist() == [True, False]
    sae.begin_step(50)  # in the middle of the warm-up of 100 tokens
    assert float(sae(torch.tensor([[3.0, 1.0]])).metrics["l1_penalty"]) == pytest.approx(l1 / 2)


@pytest.mark.parametrize("decoder_norm", ["unit", "penalty"])
def test_the_gradients(mesh, decoder_norm):
    sae = make(mesh, 30, 6, l1_coef=0.7, decoder_norm=decoder_norm)
    x = torch.randn(16, 6, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        sae.b_dec.copy_(0.3 * torch.randn(6, generator=torch.Generator().manual_seed(1)))
        if decoder_norm == "penalty":
            sae.W_dec.mul_(0.5 + torch.rand(30, 1))
    sae(x).loss.backward()
    names = ("W_enc", "b_enc", "W_dec", "b_dec")
    W_enc, b_enc, W_dec, b_dec = (getattr(sae, n).detach().requires_grad_() for n in names)
    latents = ((x - b_dec) @ W_enc.T + b_enc).relu()
    loss = (x - latents @ W_dec - b_dec).square().mean()
    norms = W_dec.norm(dim=1) if decoder_norm == "penalty" else 1.0
    loss = loss + 0.7 * (latents * norms).sum() / x.numel()
    wanted = list(torch.autograd.grad(loss, (W_enc, b_enc, W_dec, b_dec)))
    if decoder_norm == "unit":
        wanted[2] = wanted[2] - (wanted[2] * W_dec).sum(1, keepdim=True) * W_dec
    for name, gradient in zip(names, wanted, strict=True):
        torch.testing.assert_close(getattr(sae, name).grad, gradient, rtol=1e-4, atol=1e-6)
    assert tuple(sae.unit_rows) == (("W_dec",) if decoder_norm == "unit" else ())


def test_inference_has_the_gradient_of_the_dense_definition():
    W, W_dec = torch.randn(20, 6), torch.randn(20, 6)
    sae = ReLUInference(ReLUConfig(n_latents=20), W, W_dec, 0.1 * torch.ones(20), torch.ones(6))
    x = torch.randn(5, 6, requires_grad=True)
    latents = ((x - 1) @ W.T + 0.1).relu()
    torch.testing.assert_close(sae.encode(x), latents)
    (wanted,) = torch.autograd.grad((latents @ W_dec).sin().sum(), x)
    (found,) = torch.autograd.grad((sae(x) - 1).sin().sum(), x)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "value"),
    [("l1_coef", -1.0), ("decoder_norm", "none"), ("penalty_warmup_tokens", -1)],
)
def test_wrong_settings_are_refused(name, value):
    with pytest.raises(ConfigError, match=f"sae.{name}"):
        check_settings(ReLUConfig(**{name: value}))
