"""Test the stock kernels against the reference, and the reference against small cases."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foundation.errors import ConfigError
from sae_core.kernels import compact, get_kernels
from sae_core.kernels.keys import EMPTY_KEY, pack_keys, unpack_keys
from sae_core.kernels.stock.encode import streamed_topk

REFERENCE = get_kernels("reference", torch.float32)
STOCK = get_kernels("stock", torch.float32)


def integers(shape: tuple[int, ...], seed: int, span: int = 3) -> torch.Tensor:
    """Return small integers in float32, so that products are exact and ties are common."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-span, span + 1, shape, generator=generator).float()


def test_reference_by_hand():
    x, W = torch.eye(2), torch.tensor([[1.0, 5.0], [4.0, 5.0], [4.0, -1.0]])
    values, latents = REFERENCE.encode_topk(x, W, torch.tensor([0.0, 0.0, 0.5]), 2)
    assert values.tolist() == [[4.5, 4.0], [5.0, 5.0]]
    assert latents.tolist() == [[2, 1], [0, 1]]  # the tie goes to the lower index


@settings(max_examples=60, deadline=None)
@given(
    B=st.integers(1, 20),
    D=st.integers(1, 9),
    L=st.sampled_from([1, 7, 40, 64, 200, 2048, 2049, 5000]),
    k=st.integers(1, 70),
    seed=st.integers(0, 1000),
)
def test_stock_selects_exactly_what_the_reference_selects(B, D, L, k, seed):
    k = min(k, L)
    x, W, b = integers((B, D), seed), integers((L, D), seed + 1), integers((L,), seed + 2)
    expected_values, expected = REFERENCE.encode_topk(x, W, b, k)
    values, latents = STOCK.encode_topk(x, W, b, k)
    assert torch.equal(latents.sort(1).values, expected.sort(1).values)
    assert torch.equal(values.sort(1).values, expected_values.sort(1).values)


@pytest.mark.parametrize("L", [64, 4096, 9000])
def test_nan_and_infinity_are_selected_not_dropped(L):
    x, W, b = torch.ones(3, 2), integers((L, 2), 0), torch.zeros(L)
    b[L // 2], b[5], b[L - 1] = float("nan"), float("inf"), -float("nan")
    values, latents = STOCK.encode_topk(x, W, b, 4)
    for row_values, row in zip(values, latents, strict=True):
        found = dict(zip(row.tolist(), row_values.tolist(), strict=True))
        assert {L // 2, 5, L - 1} <= found.keys()
        assert found[5] == float("inf")
        assert found[L // 2] != found[L // 2]
    assert compact(values, latents).values.isnan().any()


@settings(max_examples=40, deadline=None)
@given(
    B=st.integers(1, 12),
    L=st.integers(1, 60),
    D=st.integers(1, 40),
    k=st.integers(1, 8),
    seed=st.integers(0, 99),
)
def test_sparse_operations_agree(B, L, D, k, seed):
    generator = torch.Generator().manual_seed(seed)
    x, grad, W = (torch.randn(n, D, generator=generator) for n in (B, B, L))
    active = compact(*REFERENCE.encode_topk(x, W, torch.zeros(L), min(k, L)))
    torch.testing.assert_close(STOCK.decode(active, W), REFERENCE.decode(active, W))
    dots = REFERENCE.decoder_dot(grad, active, W)
    torch.testing.assert_close(STOCK.decoder_dot(grad, active, W), dots)
    expected = REFERENCE.row_gradients(active, dots, x, grad)
    for ours, theirs in zip(STOCK.row_gradients(active, dots, x, grad), expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_weight_gradients_are_the_same_bits_every_time():
    generator = torch.Generator().manual_seed(0)
    x, W = torch.randn(512, 64, generator=generator), torch.randn(300, 64, generator=generator)
    active = compact(*STOCK.encode_topk(x, W, torch.zeros(300), 16))
    first = STOCK.row_gradients(active, active.values, x, x)
    for _ in range(3):
        again = STOCK.row_gradients(active, active.values, x, x)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_a_batch_without_active_pairs():
    active = compact(-torch.ones(3, 2), torch.zeros(3, 2, dtype=torch.int64))
    W = torch.ones(4, 5)
    assert STOCK.decode(active, W).tolist() == torch.zeros(3, 5).tolist()
    gradients = STOCK.row_gradients(active, active.values, torch.ones(3, 5), torch.ones(3, 5))
    assert [len(part) for part in gradients] == [0, 0, 0, 0]


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=2, max_size=30), st.integers(0, 9))
def test_keys_order_like_values_then_lower_latents(values, seed):
    tensor = torch.tensor(values, dtype=torch.float32)
    latents = torch.randperm(len(values), generator=torch.Generator().manual_seed(seed))
    keys = pack_keys(tensor, latents)
    order = sorted(range(len(values)), key=lambda i: (-values[i], int(latents[i])))
    assert keys.sort(descending=True).indices.tolist() == order
    back, index = unpack_keys(keys)
    assert torch.equal(back, tensor) and torch.equal(index, latents)
    assert (keys > EMPTY_KEY).all()


def test_bfloat16_selects_by_bfloat16_products():
    generator = torch.Generator().manual_seed(0)
    x, W = torch.randn(8, 32, generator=generator), torch.randn(4096, 32, generator=generator)
    half = get_kernels("stock", torch.bfloat16)
    values, _ = half.encode_topk(x, W, torch.zeros(4096), 8)
    expected, _ = REFERENCE.encode_topk(x.bfloat16(), W.bfloat16(), torch.zeros(4096), 8)
    assert values.dtype == torch.float32
    torch.testing.assert_close(values.sort(1).values, expected.float().sort(1).values)


def test_unknown_bodies_and_dtypes_are_named():
    with pytest.raises(ConfigError, match="one of: stock, triton, reference"):
        get_kernels("fast", torch.float32)
    with pytest.raises(ConfigError, match="float32 or bfloat16"):
        get_kernels("stock", torch.float16)


@pytest.mark.parametrize("shift", [0.0, -9.0, 9.0])
@pytest.mark.parametrize("L", [1000, 4096, 9000])
def test_streams_of_bfloat16_pieces_keep_the_largest_of_either_sign(shift, L, monkeypatch):
    monkeypatch.setattr("sae_core.kernels.stock.encode.PIECE_ELEMENTS", 1)  # pieces of 2048
    generator = torch.Generator().manual_seed(L)
    pre_acts = (torch.randn(7, L, generator=generator) + shift).bfloat16()
    values, latents = streamed_topk(lambda a, b: pre_acts[:, a:b], 7, L, 9, pre_acts.device)
    expected, wanted = pre_acts.float().sort(dim=1, descending=True, stable=True)
    assert torch.equal(values, expected[:, :9]) and torch.equal(latents, wanted[:, :9])
