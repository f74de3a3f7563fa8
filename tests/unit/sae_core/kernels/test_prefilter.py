"""Test that a prefilter never changes which k latents are selected."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foundation.errors import ConfigError
from sae_core.config import TrainConfig
from sae_core.kernels import get_kernels
from sae_core.kernels.prefilter import Candidates, Prefilter, prefiltered_topk, uncertified
from sae_core.kernels.stock.body import StockKernels
from sae_core.kernels.stock.prefilter_bfloat16 import Bfloat16Prefilter
from sae_core.kernels.triton.prefilter_float8 import (
    SLOTS,
    Float8Prefilter,
    dequantise,
    split_rows,
    split_spec,
)

REFERENCE = get_kernels("reference", torch.float64)
EXACT = StockKernels(torch.float32)


def emulated_float8_topk(x, W, b, count):
    """Compute the TopK of the split rows' product in float32: the same numbers, but slowly."""
    return EXACT.exact_topk(dequantise(x), dequantise(W), b, count)


PREFILTERS: list[Prefilter] = [
    Bfloat16Prefilter(split=True),
    Bfloat16Prefilter(split=False),
    Float8Prefilter(emulated_float8_topk, split_rows),
]


def names(prefilters):
    return [each.name for each in prefilters]


def normal(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def assert_exact(prefilter, x, W, b, k):
    values, latents = prefiltered_topk(prefilter, EXACT, x, W, b, k)
    expected, wanted = REFERENCE.encode_topk(x.double(), W.double(), b.double(), k)
    assert torch.equal(latents, wanted)
    torch.testing.assert_close(values.double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("prefilter", PREFILTERS, ids=names(PREFILTERS))
@settings(max_examples=25, deadline=None)
@given(
    B=st.integers(1, 12),
    D=st.sampled_from([1, 9, 40, 256]),
    L=st.sampled_from([1, 7, 200, 1000, 5000]),
    k=st.integers(1, 40),
    seed=st.integers(0, 1000),
)
def test_random_rows(prefilter, B, D, L, k, seed):
    x, W, b = normal(seed, B, D), normal(seed + 1, L, D), normal(seed + 2, L) * 0.1
    values, latents = prefiltered_topk(prefilter, EXACT, x, W, b, min(k, L))
    expected, _ = REFERENCE.encode_topk(x.double(), W.double(), b.double(), min(k, L))
    torch.testing.assert_close(values.double(), expected, atol=1e-5, rtol=1e-5)
    scores = x.double() @ W.double().T + b.double()
    torch.testing.assert_close(scores.gather(1, latents), expected, atol=1e-5, rtol=1e-5)
    assert all(len(set(row.tolist())) == len(row) for row in latents)


@pytest.mark.parametrize("prefilter", PREFILTERS, ids=names(PREFILTERS))
def test_ties_go_to_the_lowest_latent(prefilter):
    generator = torch.Generator().manual_seed(0)
    x, W = (torch.randint(-2, 3, (n, 24), generator=generator).float() for n in (30, 3000))
    assert_exact(prefilter, x, W, torch.zeros(3000), 20)


@pytest.mark.parametrize("prefilter", PREFILTERS, ids=names(PREFILTERS))
@pytest.mark.parametrize("bias", [-40.0, -1000.0])
def test_rows_without_positive_values(prefilter, bias):
    x, W = normal(1, 9, 40), normal(2, 2000, 40)
    assert_exact(prefilter, x, W, torch.full((2000,), bias), 8)


def test_rows_that_cannot_be_certified_are_encoded_again():
    # 3,000 latents within a rounding of each other: no choice of candidates can be certified.
    direction = torch.nn.functional.normalize(normal(0, 1, 64), dim=1)
    W = direction * (1 + torch.arange(3000)[torch.randperm(3000)] * 1e-6)[:, None]
    x = direction.repeat(5, 1) * torch.tensor([1.0, 2.0, 0.5, 3.0, 1.0])[:, None]
    exact, wanted = EXACT.exact_topk(x, W, torch.zeros(3000), 10)
    offered = Bfloat16Prefilter(split=True).candidates(x, W, torch.zeros(3000), 10)
    assert uncertified(offered, exact[:, -1], 3000).all()
    _, latents = prefiltered_topk(Bfloat16Prefilter(split=True), EXACT, x, W, torch.zeros(3000), 10)
    assert torch.equal(latents.sort(1).values, wanted.sort(1).values)
    assert not all(
        set(row) >= set(best)
        for row, best in zip(offered.latents.tolist(), wanted.tolist(), strict=True)
    )


@pytest.mark.parametrize("prefilter", PREFILTERS, ids=names(PREFILTERS))
@pytest.mark.parametrize("where", ["x", "W", "b"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("nan")])
def test_non_finite_values_are_selected_not_dropped(prefilter, where, value):
    x, W, b = normal(0, 4, 16), normal(1, 1000, 16), torch.zeros(1000)
    {"x": x[1], "W": W[500], "b": b}[where].view(-1)[3] = value
    values, _ = prefiltered_topk(prefilter, EXACT, x, W, b, 5)
    expected, _ = EXACT.exact_topk(x, W, b, 5)
    torch.testing.assert_close(values, expected, equal_nan=True)


@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize("outlier", [1.0, 300.0])
def test_the_bfloat16_margins_cover_every_error(split, outlier):
    x, W, b = normal(0, 40, 512), normal(1, 3000, 512), normal(2, 3000)
    x[:, 7] *= outlier
    offered = Bfloat16Prefilter(split).candidates(x, W, b, 30)
    exact = (x.double() @ W.double().T + b.double()).gather(1, offered.latents)
    error = (exact - offered.values).abs().amax(1)
    assert (error <= offered.margin).all()
    assert (error > offered.margin / 300).all()  # and the bound is not absurdly loose


def split_product(x, W):
    """Return (product of the split rows, the bounds it contains), both [B, L]."""
    parts = [
        dequantise(split_rows(m, w)).double() for m, w in zip((x, W), split_spec(x, W), strict=True)
    ]
    product, bounds = (
        parts[0][:, columns] @ parts[1][:, columns].T
        for columns in (slice(-SLOTS), slice(-SLOTS, None))
    )
    return product, bounds


def with_outliers(size, seed=0):
    """Return x with an eighth of its channels enlarged, one of them by `size`, and W."""
    x, W = normal(seed, 40, 512), normal(seed + 1, 3000, 512)
    x[:, :60] *= 4
    x[:, 7] *= size
    W[:5] = 0
    W[torch.arange(5), torch.tensor([7, 8, 100, 200, 300])] = 1.1  # each reads a single channel
    return x, W


@pytest.mark.parametrize("size", [1.0, 300.0])
def test_the_float8_bounds_are_six_deviations_of_every_pair(size):
    x, W = with_outliers(size)
    product, bounds = split_product(x, W)
    error = (product - x.double() @ W.double().T).abs()
    assert (error < bounds).all()
    # The bound is not absurdly loose: it leaves out the bfloat16 channels, and the
    # Cauchy-Schwarz inequality loses a factor of 2.
    assert (error.square().mean(1).sqrt() > bounds.mean(1) / 30).all()


def test_a_long_latent_raises_only_its_own_bound():
    x, W = with_outliers(30.0)
    _, before = split_product(x, W)
    W[1000] *= 10
    _, after = split_product(x, W)
    assert (after[:, 1000] > 5 * before[:, 1000]).all()
    others = torch.arange(3000) != 1000
    assert (after[:, others] < 1.3 * before[:, others]).all()


def test_float8_certifies_rows_with_outlier_channels():
    x, W = normal(0, 200, 512), normal(1, 4096, 512) / 23
    x[:, :40] *= torch.linspace(3, 17, 40)
    W[:, :40] /= torch.linspace(3, 17, 40)
    b = torch.zeros(4096)
    # As with a trained dictionary, 30 latents a row stand out.
    best = torch.randint(0, 4096, (200, 30), generator=torch.Generator().manual_seed(0))
    x += 6 * W[best].sum(1)
    offered = PREFILTERS[2].candidates(x, W, b, 30)
    exact, _ = EXACT.exact_topk(x, W, b, 30)
    assert (~uncertified(offered, exact[:, -1], 4096)).float().mean() > 0.9
    assert_exact(PREFILTERS[2], x, W, b, 30)


def massive_channel_case():
    """Return x, W, b with one massive channel, which eight biased latents read alone."""
    x, W, b = normal(0, 64, 768), normal(1, 4096, 768) / 768**0.5, torch.zeros(4096)
    x[:, 7] = 300 + 3 * normal(2, 64)
    W[100:108] = 0
    W[100:108, 7] = 1.0
    b[100:108] = -297.0 - torch.arange(8) * 0.25
    W[:100, 7] = W[108:, 7] = 0.0
    return x, W, b


@pytest.mark.parametrize("prefilter", PREFILTERS, ids=names(PREFILTERS))
def test_latents_that_read_only_a_massive_channel(prefilter):
    x, W, b = massive_channel_case()
    assert_exact(prefilter, x, W, b, 32)


def test_rounding_errors_that_add_up_do_not_fool_the_proven_margin():
    x = torch.full((8, 512), 1 + 0.9 * 2.0**-8)
    W = normal(1, 3000, 512) / 512**0.5
    W[5] = 3.0 / 512
    b = torch.zeros(3000)
    assert_exact(Bfloat16Prefilter(split=True), x, W, b, 8)


def test_split_rows_are_near_their_rows_and_keep_zeros():
    x = normal(0, 6, 130)
    x[:, 5] *= 1000
    x[2] = 0
    x[3, 6:] = 0  # nothing is left for float8
    weights, _ = split_spec(x, normal(1, 50, 130))
    rows = split_rows(x, weights)
    assert rows.low.dtype == torch.float8_e4m3fn and rows.low.shape == (6, 80)
    assert rows.side.dtype == torch.bfloat16 and rows.side.shape == (6, 64)
    assert weights.n_side == 62 and 5 in weights.channels[68:]
    assert set(weights.channels.tolist()) == set(range(130))
    assert torch.equal(rows.scales, torch.exp2(rows.scales.log2().round()))
    back = dequantise(rows)
    low, side = back[:, :68], back[:, 80 : 80 + 62]
    torch.testing.assert_close(side, x[:, weights.channels[68:]], rtol=2.0**-8, atol=0)
    wanted = x[:, weights.channels[:68]]
    assert ((low - wanted).abs() <= wanted.abs() / 16 + rows.scales[:, None] / 1024).all()
    assert not back[2].any() and back.isfinite().all()


def test_rows_without_a_float8_part_do_not_overflow():
    x, W = torch.zeros(9, 64), normal(1, 1000, 64) * 1e-3
    x[:, :8], W[:500, 8:] = normal(0, 9, 8) * 1e4, 0
    W[:, :8] *= 1e6
    assert_exact(PREFILTERS[2], x, W, torch.zeros(1000), 8)
    for matrix, weights in zip((x, W), split_spec(x, W), strict=True):
        rows = split_rows(matrix, weights)
        # The product of two such rows, computed before rescaling, stays finite.
        assert rows.side.float().abs().max() <= 2.0**25


def test_a_certificate_needs_more_than_a_tie_with_the_margin():
    offered = Candidates(torch.tensor([[3.0, 1.0]]), torch.zeros(1, 2), torch.tensor([0.5]))
    assert not uncertified(offered, torch.tensor([1.5]), 100).any()
    assert uncertified(offered, torch.tensor([1.49]), 100).all()
    assert uncertified(offered, torch.tensor([float("nan")]), 100).all()
    assert not uncertified(offered, torch.tensor([0.0]), 2).any()  # all latents are candidates


def test_invalid_settings_are_refused():
    with pytest.raises(ConfigError, match="none, bfloat16 or bfloat16x3"):
        get_kernels("stock", torch.float32, prefilter="float8")
    with pytest.raises(ConfigError, match="compute_dtype=float32"):
        get_kernels("stock", torch.bfloat16, prefilter="bfloat16")
    with pytest.raises(ConfigError, match="float32 for kernels=stock"):
        get_kernels("stock", torch.float32, tf32=True)


@pytest.mark.parametrize(
    ("kernels", "device", "dtype", "prefilter", "fits"),
    [
        ("stock", "auto", "auto", "float8", False),
        ("auto", "cpu", "auto", "float8", False),
        ("auto", "cuda", "auto", "bfloat16x3", False),
        ("reference", "auto", "auto", "bfloat16", False),
        ("triton", "cuda", "tf32", "float8", False),
        ("stock", "cpu", "bfloat16", "bfloat16", False),
        ("auto", "auto", "auto", "float8", True),
        ("triton", "auto", "bfloat16", "float8", True),
        ("stock", "cpu", "float32", "bfloat16x3", True),
        ("reference", "cpu", "auto", "auto", True),
    ],
)
def test_a_prefilter_that_the_kernels_lack_is_refused_before_ranks_start(
    kernels, device, dtype, prefilter, fits
):
    config = TrainConfig(device=device, compute_dtype=dtype, kernels=kernels, prefilter=prefilter)
    if fits:
        config.validate()
        return
    with pytest.raises(ConfigError, match=r"train.prefilter"):
        config.validate()
