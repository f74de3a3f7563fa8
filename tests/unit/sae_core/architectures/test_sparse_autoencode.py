"""Test the sparse step's loss and gradients against a dense definition under autograd."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from sae_core.architectures.dictionary_init import random_unit_rows
from sae_core.architectures.sparse_autoencode import (
    AuxInput,
    Dictionary,
    SparsePlan,
    sparse_autoencode,
)
from sae_core.kernels import get_kernels, subset_of

B, D, L, K, AUXK = 32, 12, 80, 5, 7


def dense(x, W_enc, b_enc, W_dec, b_dec, dead):
    """Return the loss of TopK and AuxK, computed with dense tensors for torch's autograd."""
    pre_acts = (x - b_dec) @ W_enc.T + b_enc
    top = torch.zeros_like(pre_acts).scatter(1, pre_acts.topk(K).indices, 1.0)
    recon = (pre_acts * top).relu() @ W_dec + b_dec
    fvu = (x - recon).square().mean()
    # The auxiliary loss treats b_dec as a constant.
    aux_pre = (x - b_dec.detach()) @ W_enc.T + b_enc
    chosen = aux_pre.masked_fill(~dead, float("-inf")).topk(min(AUXK, int(dead.sum()))).indices
    mask = torch.zeros_like(aux_pre).scatter(1, chosen, 1.0)
    residual = (x - recon).detach()
    aux = (residual - (aux_pre * mask).relu() @ W_dec).square().sum() / residual.square().sum()
    return fvu + aux / 32


@pytest.mark.parametrize("kernels", ["stock", "reference"])
@pytest.mark.parametrize("n_dead", [1, 4, 30])
def test_gradients(kernels, n_dead):
    generator = torch.Generator().manual_seed(n_dead)
    x = torch.randn(B, D, generator=generator)
    parameters = [
        torch.randn(L, D, generator=generator),
        torch.randn(L, generator=generator) * 0.1,
        random_unit_rows(0, L, D, 1),
        torch.randn(D, generator=generator) * 0.1,
    ]
    dead = torch.zeros(L, dtype=torch.bool)
    dead[torch.randperm(L, generator=generator)[:n_dead]] = True

    ours = [p.clone().requires_grad_() for p in parameters]
    plan = SparsePlan(get_kernels(kernels, torch.float32), L, K, AUXK, 0, None)
    aux = AuxInput(subset_of(dead), None)
    out = sparse_autoencode(x, Dictionary(*ours), plan, aux)
    assert out.aux_squared_error is not None
    aux_loss = out.aux_squared_error / out.squared_error.detach()
    loss = out.squared_error / x.numel() + aux_loss / 32
    loss.backward()

    theirs = [p.clone().requires_grad_() for p in parameters]
    W_enc, b_enc, W_dec, b_dec = theirs
    expected = dense(x, W_enc, b_enc, W_dec, b_dec, dead)
    expected.backward()
    torch.testing.assert_close(loss, expected)
    for name, a, b in zip(("W_enc", "b_enc", "W_dec", "b_dec"), ours, theirs, strict=True):
        wanted = b.grad
        assert wanted is not None
        if name == "W_dec":  # ours leaves out the component along the unit rows
            wanted = wanted - (wanted * b).sum(1, keepdim=True) * b.detach()
        torch.testing.assert_close(a.grad, wanted, atol=1e-6, rtol=1e-4, msg=name)
    assert ours[0].grad is not None
    assert (ours[0].grad[dead].abs().sum(1) > 0).any()  # AuxK reaches the dead encoder rows


def test_the_decoder_gradient_is_orthogonal_to_its_rows():
    x = torch.randn(B, D, generator=torch.Generator().manual_seed(0))
    W = random_unit_rows(0, L, D, 2)
    W_dec = W.clone().requires_grad_()
    plan = SparsePlan(get_kernels("stock", torch.float32), L, K, AUXK, 0, None)
    weights = Dictionary(W, torch.zeros(L), W_dec, torch.zeros(D))
    sparse_autoencode(x, weights, plan, None).squared_error.backward()
    assert W_dec.grad is not None and W_dec.grad.norm() > 1
    assert (W_dec.grad * W_dec).sum(1).abs().max() < 1e-4


def test_gathering_in_bfloat16_rounds_only_inputs_and_errors():
    generator = torch.Generator().manual_seed(0)
    x, W_enc = torch.randn(B, D, generator=generator), torch.randn(L, D, generator=generator)
    weights = (W_enc, torch.zeros(L), random_unit_rows(0, L, D, 1), torch.zeros(D))
    gathered, losses = [], []
    for dtype in (None, torch.bfloat16):
        kernels = get_kernels("stock", torch.float32)
        kernels.gather_dtype = dtype
        own = [w.clone().requires_grad_() for w in weights]
        plan = SparsePlan(kernels, L, K, AUXK, 0, None)
        out = sparse_autoencode(x, Dictionary(*own), plan, None)
        out.squared_error.backward()
        losses.append(out.squared_error)
        gathered.append([w.grad for w in own])
    assert torch.equal(losses[0], losses[1])
    for name, exact, rounded in zip(("W_enc", "b_enc", "W_dec", "b_dec"), *gathered, strict=True):
        if name.startswith("b_"):
            assert torch.equal(exact, rounded), name
        else:
            assert 1e-4 < (rounded - exact).norm() / exact.norm() < 2.0**-8, name


@pytest.mark.parametrize("n_dead", [0, 3])
def test_a_step_frees_its_arrays(n_dead):
    """An autograd node that keeps its own outputs is never freed: 22 MB a step of the demo."""
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(L, D, generator=generator), torch.zeros(L)]
    weights += [random_unit_rows(0, L, D, 1), torch.zeros(D)]
    plan = SparsePlan(get_kernels("stock", torch.float32), L, K, AUXK, 0, None)
    dead = torch.arange(L) < n_dead
    aux = AuxInput(subset_of(dead), None) if n_dead else None
    own = [w.clone().requires_grad_() for w in weights]
    out = sparse_autoencode(torch.randn(B, D, generator=generator), Dictionary(*own), plan, aux)
    loss = out.squared_error
    if out.aux_squared_error is not None:
        loss = loss + out.aux_squared_error
    loss.backward()
    held = weakref.ref(out.inputs.rows)
    gc.disable()  # the arrays must not wait for the garbage collector either
    try:
        del out, loss
        assert held() is None
    finally:
        gc.enable()
