"""Test the fused update against torch's Adam on dense gradients, and bfloat16 moments."""

from __future__ import annotations

import pytest
import torch

from sae_core.kernels import (
    AdamStep,
    RowState,
    SparseGradient,
    SparseLatents,
    get_kernels,
    square_sum,
)
from sae_core.kernels.rounding import random_bits, round_stochastically_, salt_of

L, D, R = 300, 20, 64


def normal(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def sparse_gradient(seed):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.arange(R).repeat_interleave(4)
    shuffled = torch.rand(R, L // 2, generator=generator)
    shuffled[:, 5] += torch.arange(R) % 2  # a hot latent
    latents = shuffled.topk(4, dim=1).indices.reshape(-1)
    values, dvalues = normal(seed + 1, len(rows)), normal(seed + 2, len(rows))
    pairs = SparseLatents(rows, latents, values, torch.arange(R) * 4, torch.arange(R) * 4 + 4)
    return SparseGradient(pairs, dvalues, normal(seed + 3, R, D), normal(seed + 4, R, D), R)


def fresh_state(dtype=torch.float32, first_latent=0):
    weights = normal(0, L, D), torch.nn.functional.normalize(normal(1, L, D), dim=1), normal(2, L)

    def zeros():
        W_enc, W_dec, b_enc = weights
        return (
            torch.zeros_like(W_enc, dtype=dtype),
            torch.zeros_like(W_dec, dtype=dtype),
            torch.zeros_like(b_enc),
        )

    return RowState(*weights, zeros(), zeros(), None, first_latent)


def adam_step(step, skip=0.0, divisor=None):
    divisor = None if divisor is None else torch.tensor(divisor)
    return AdamStep(1e-2, 0.9, 0.999, 1e-8, torch.tensor(float(step)), divisor, torch.tensor(skip))


def dense_gradients(gradient, W_dec):
    dW_enc, dW_dec, db = torch.zeros(L, D), torch.zeros(L, D), torch.zeros(L)
    pairs = gradient.pairs
    dW_dec.index_add_(0, pairs.latents, pairs.values[:, None] * gradient.error[pairs.rows])
    dW_enc.index_add_(0, pairs.latents, gradient.dvalues[:, None] * gradient.x[pairs.rows])
    db.index_add_(0, pairs.latents, gradient.dvalues)
    return dW_enc, dW_dec - (dW_dec * W_dec).sum(1, keepdim=True) * W_dec, db


@pytest.mark.parametrize("shape", [(20_000, 500), (1000,), (3_000_001,), (7,), (0, 5)])
def test_a_sum_of_squares_is_right_to_the_last_digits(shape):
    values = normal(0, *shape)
    expected = values.double().square().sum()
    torch.testing.assert_close(square_sum(values).double(), expected, rtol=2e-6, atol=0)
    torch.testing.assert_close(square_sum(values.double()), expected, rtol=1e-12, atol=0)
    low = values.bfloat16()
    expected = low.double().square().sum()
    torch.testing.assert_close(square_sum(low).double(), expected, rtol=2e-6, atol=0)


@pytest.mark.parametrize("name", ["stock", "reference"])
@pytest.mark.parametrize("divisor", [None, 3.0])
def test_equals_torch_adam_on_the_dense_gradient(name, divisor, monkeypatch):
    monkeypatch.setattr("sae_core.kernels.stock.update._BLOCK_BYTES", 4 * D * 7)  # ragged blocks
    kernels, state = get_kernels(name, torch.float32), fresh_state()
    masters = [torch.nn.Parameter(w.clone()) for w in (state.W_enc, state.W_dec, state.b_enc)]
    adam = torch.optim.Adam(masters, lr=1e-2, eps=1e-8)
    for step in range(1, 5):
        gradient = sparse_gradient(step * 10)
        wanted = dense_gradients(gradient, masters[1].detach())
        update = kernels.row_update(gradient, state.W_dec)
        torch.testing.assert_close(update.square(), sum(g.square().sum() for g in wanted))
        update.apply(state, adam_step(step, divisor=divisor))
        for master, grad in zip(masters, wanted, strict=True):
            master.grad = grad / (divisor or 1.0)
        adam.step()
        masters[1].data = torch.nn.functional.normalize(masters[1].data, dim=1)
        for ours, theirs in zip((state.W_enc, state.W_dec, state.b_enc), masters, strict=True):
            torch.testing.assert_close(ours, theirs.detach(), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_skipped_update_changes_nothing(dtype):
    kernels, state = get_kernels("stock", torch.float32), fresh_state(dtype)
    kernels.row_update(sparse_gradient(1), state.W_dec).apply(state, adam_step(1))
    arrays = [state.W_enc, state.W_dec, state.b_enc, *state.exp_avg, *state.exp_avg_sq]
    before = [array.clone() for array in arrays]
    kernels.row_update(sparse_gradient(2), state.W_dec).apply(state, adam_step(1, skip=1.0))
    assert all(torch.equal(a, b) for a, b in zip(arrays, before, strict=True))


def test_bfloat16_moments_follow_float32_ones_in_the_mean():
    kernels, exact, low = (
        get_kernels("stock", torch.float32),
        fresh_state(),
        fresh_state(torch.bfloat16),
    )
    for step in range(1, 301):
        gradient = sparse_gradient(7)  # constant, so that v approaches its square
        for state in (exact, low):
            kernels.row_update(gradient, state.W_dec).apply(state, adam_step(step))
    used = exact.exp_avg_sq[0] > 1e-3
    ratio = low.exp_avg_sq[0].float()[used] / exact.exp_avg_sq[0][used]
    assert abs(float(ratio.mean()) - 1) < 0.01  # with rounding to nearest, v stalls at a fifth
    assert float(ratio.std()) < 0.05
    assert low.exp_avg[0].dtype == torch.bfloat16 and low.exp_avg[2].dtype == torch.float32


def test_stochastic_rounding_is_unbiased_and_keeps_exact_and_non_finite_values():
    source = torch.full((400, 500), 1.0 + 2.0**-10)  # an eighth of the way to the next bfloat16
    out = torch.empty_like(source, dtype=torch.bfloat16)
    round_stochastically_(out, source, 0, salt_of(torch.tensor(3.0), 1))
    assert set(out.unique().tolist()) == {1.0, 1.0 + 2.0**-7}
    assert abs(float((out > 1).float().mean()) - 0.125) < 0.004
    exact = torch.tensor([[0.0, -0.0, 1.5, -3.0, float("inf"), -float("inf"), float("nan")]])
    kept = torch.empty_like(exact, dtype=torch.bfloat16)
    round_stochastically_(kept, exact, 9, salt_of(torch.tensor(1.0), 0))
    torch.testing.assert_close(kept.float(), exact, equal_nan=True, rtol=0, atol=0)


def test_rounding_depends_on_the_global_row_step_and_array_alone():
    def bits(n, first, step, array):
        salt = salt_of(torch.tensor(float(step)), array)
        return random_bits(torch.Size((n, 64)), first, salt, torch.device("cpu"))

    whole = bits(100, 0, 5, 0)
    assert torch.equal(whole[40:], bits(60, 40, 5, 0))  # another shard, the same rows
    for other in (bits(100, 0, 6, 0), bits(100, 0, 5, 1), bits(100, 100, 5, 0)):
        assert float((whole == other).float().mean()) < 0.01
    assert abs(float(whole.float().mean()) - 32767.5) < 700
    assert abs(float(torch.corrcoef(whole[:, :2].T.float())[0, 1])) < 0.4
