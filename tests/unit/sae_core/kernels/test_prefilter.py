"""Test that a prefilter never changes which k latents are selected."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foundation.errors import ConfigError
from sae_core.config import TrainConfig
from sae_core.kernels import get_kernels
from sae_core.kernels.interface import EMPTY
from sae_core.kernels.keys import LARGEST_NETWORK, pool_width
from sae_core.kernels.prefilter import (
    Candidates,
    n_float8_candidates,
    prefiltered_topk,
    uncertified,
)
from sae_core.kernels.stock.body import StockKernels
from sae_core.kernels.stock.prefilter_bfloat16 import Bfloat16Prefilter
from sae_core.kernels.triton.prefilter_float8 import (
    SLOTS,
    Float8Prefilter,
    dequantise,
    split_rows,
    split_spec,
    sum_weights,
)
from tests.support.kernels.float8_units import float8_product, truncated_product

REFERENCE = get_kernels("reference", torch.float64)
EXACT = StockKernels(torch.float32)


def emulated_float8_topk(x, W, b, count):
    """Compute the TopK of the split rows' product in float32: the same numbers, but slowly."""
    return EXACT.exact_topk(dequantise(x), dequantise(W), b, count)


needs_bfloat16 = pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(),
    reason="this CPU has no AVX-512, which oneDNN needs for products in bfloat16",
)
FLOAT8 = Float8Prefilter(emulated_float8_topk, split_rows)
PREFILTERS = [
    pytest.param(Bfloat16Prefilter(split=True), id="bfloat16x3", marks=needs_bfloat16),
    pytest.param(Bfloat16Prefilter(split=False), id="bfloat16", marks=needs_bfloat16),
    pytest.param(FLOAT8, id="float8"),
]


def normal(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def assert_exact(prefilter, x, W, b, k):
    values, latents = prefiltered_topk(prefilter, EXACT, x, W, b, k)
    expected, wanted = REFERENCE.encode_topk(x.double(), W.double(), b.double(), k)
    assert torch.equal(latents, wanted)
    torch.testing.assert_close(values.double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("prefilter", PREFILTERS)
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


@pytest.mark.parametrize("prefilter", PREFILTERS)
def test_ties_go_to_the_lowest_latent(prefilter):
    generator = torch.Generator().manual_seed(0)
    x, W = (torch.randint(-2, 3, (n, 24), generator=generator).float() for n in (30, 3000))
    assert_exact(prefilter, x, W, torch.zeros(3000), 20)


@pytest.mark.parametrize("prefilter", PREFILTERS)
@pytest.mark.parametrize("bias", [-40.0, -1000.0])
def test_rows_without_positive_values(prefilter, bias):
    x, W = normal(1, 9, 40), normal(2, 2000, 40)
    assert_exact(prefilter, x, W, torch.full((2000,), bias), 8)


@needs_bfloat16
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


@pytest.mark.parametrize("prefilter", PREFILTERS)
@pytest.mark.parametrize("where", ["x", "W", "b"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("nan")])
def test_non_finite_values_are_selected_not_dropped(prefilter, where, value):
    x, W, b = normal(0, 4, 16), normal(1, 1000, 16), torch.zeros(1000)
    {"x": x[1], "W": W[500], "b": b}[where].view(-1)[3] = value
    values, _ = prefiltered_topk(prefilter, EXACT, x, W, b, 5)
    expected, _ = EXACT.exact_topk(x, W, b, 5)
    torch.testing.assert_close(values, expected, equal_nan=True)


@needs_bfloat16
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
def test_the_float8_bounds_cover_every_pair(size):
    x, W = with_outliers(size)
    product, bounds = split_product(x, W)
    error = (product - x.double() @ W.double().T).abs()
    assert (error < bounds).all()
    # The bound is not absurdly loose: it leaves out the bfloat16 channels, and the
    # Cauchy-Schwarz inequality loses a factor of 2.
    assert (error.square().mean(1).sqrt() > bounds.mean(1) / 30).all()


KINDS = {
    "normal": lambda rows: rows,
    "positive": torch.abs,
    "outliers": lambda rows: rows * torch.where(torch.arange(rows.shape[1]) % 7 == 3, 40.0, 1.0),
    "sparse": lambda rows: rows * (rows.abs() > 1),
    "tiny": lambda rows: rows * 1e-12,
    "subnormal": lambda rows: rows * 1e-39,
    "huge": lambda rows: rows * 1e20,
    # Equal elements within a row: their rounding errors all add up.
    "constant": lambda rows: rows[:, :1].expand_as(rows).contiguous(),
}
VARIED = [kind for kind in KINDS if kind != "constant"]


@settings(max_examples=40, deadline=None)
@given(
    kinds=st.tuples(st.sampled_from(VARIED), st.sampled_from(VARIED)),
    D=st.sampled_from([3, 40, 129, 300, 700]),
    seed=st.integers(0, 1000),
)
def test_float8_errors_are_within_their_bounds(kinds, D, seed):
    x, W = KINDS[kinds[0]](normal(seed, 3, D)), KINDS[kinds[1]](normal(seed + 9, 200, D))
    rows, latents = (split_rows(m, w) for m, w in zip((x, W), split_spec(x, W), strict=True))
    upper = truncated_product(rows, latents)
    offered = Float8Prefilter(lambda *_: (upper, upper), split_rows).candidates(
        x, W, torch.zeros(200), 8
    )
    exact = x.double() @ W.double().T
    # Latents are chosen by these bounds alone, so none may be exceeded.
    finite = offered.margin.isfinite()
    assert (exact <= upper + offered.margin.double()[:, None])[finite].all()
    # A row without a certificate costs a second product: ordinary rows must have one.
    assert finite.all() or "huge" in kinds


def test_rounding_errors_that_add_up_exceed_the_float8_bounds():
    # The certificate is probabilistic. Here its assumption is false: the elements of x are equal,
    # so their rounding errors are, too, and with weights of one sign they do not cancel.
    x, W = torch.full((1, 700), 1.06), normal(1, 200, 700).abs()
    product, bounds = split_product(x, W)
    assert (x.double() @ W.double().T - product > bounds).all()


@settings(max_examples=40, deadline=None)
@given(
    kinds=st.tuples(st.sampled_from(list(KINDS)), st.sampled_from(list(KINDS))),
    D=st.sampled_from([3, 40, 129, 300, 700]),
    seed=st.integers(0, 1000),
)
def test_the_bound_on_truncated_sums_is_at_least_half_of_the_loss(kinds, D, seed):
    x, W = KINDS[kinds[0]](normal(seed, 3, D)), KINDS[kinds[1]](normal(seed + 9, 100, D))
    rows, latents = (split_rows(m, w) for m, w in zip((x, W), split_spec(x, W), strict=True))
    bounds = rows.side[:, -1:].double() @ latents.side[:, -1:].double().T
    exact = rows.low.double() @ latents.low.double().T
    # In float64, sums of float8 products are exact. The factor 2 makes the bound strict.
    float32_sums = 2.0**-20 * rows.low.double().abs() @ latents.low.double().abs().T
    loss = (exact - float8_product(rows.low, latents.low)).abs()
    assert (loss <= 2 * bounds + float32_sums).all()
    if kinds == ("positive", "positive") and D >= 300:
        # Truncation has a direction: with equal signs it does not average out.
        assert (loss > bounds / 200).all() and (loss <= bounds).all()


def test_the_bound_on_truncated_sums_is_half_of_what_can_be_lost():
    # After the first step, the running sum is 2**21, so that the later steps' products, each below
    # 2**8, are cut off entirely.
    low = torch.tensor([[256.0] * 32 + [15.0] * 96])
    spec, _ = split_spec(normal(0, 2, 128), normal(1, 2, 128))
    bound = spec.sums * float(sum_weights(low))
    loss = float((low.double() @ low.double().T - float8_product(low, low)).squeeze())
    assert loss == 96 * 15**2
    assert bound < loss < 2 * bound


def close_latents(seed, gap, D=300, L=2000):
    """Return rows and latents whose pre-activations differ about as much as float8 errors."""
    x, W = normal(seed, 6, D), normal(seed + 1, L, D) / D**0.5
    return x, gap * W + x[seed % 6] / x[seed % 6].norm()


@settings(max_examples=25, deadline=None)
@given(
    kind=st.sampled_from(["close", *KINDS]),
    gap=st.sampled_from([0.01, 0.03, 0.1, 0.3]),
    D=st.sampled_from([40, 129, 300]),
    seed=st.integers(0, 1000),
)
def test_no_row_is_certified_wrongly(kind, gap, D, seed):
    if kind == "close":
        x, W = close_latents(seed, gap, D)
    else:
        x, W = KINDS[kind](normal(seed, 6, D)), normal(seed + 1, 2000, D) / D**0.5
    b, k = 0.01 * normal(seed + 2, 2000), 8
    offered = Float8Prefilter(truncated_float8_topk, split_rows).candidates(x, W, b, k)
    scores = x.double() @ W.double().T + b.double()
    wanted = scores.topk(k, dim=1).values
    found = scores.gather(1, offered.latents).topk(k, dim=1).values
    certified = ~uncertified(offered, found[:, -1].float(), 2000)
    rounding = 1e-6 * scores.abs().amax(1)
    missed = (found - wanted).abs().amax(1) > rounding
    assert not (certified & missed).any()


def truncated_float8_topk(x, W, b, count):
    """Compute the TopK of the split rows' product with float8 sums truncated."""
    values, latents = (truncated_product(x, W) + b.double()).topk(count, dim=1)
    return values.float(), latents


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_rows_with_values_that_are_not_finite_are_not_certified(value):
    x, W, b = normal(0, 4, 40), normal(1, 1000, 40), torch.zeros(1000)
    x[2, 3] = value
    offered = FLOAT8.candidates(x, W, b, 5)
    failed = uncertified(offered, torch.full((4,), 1e30), 1000)
    assert failed.tolist() == [False, False, True, False]
    W[7, 3] = value
    offered = FLOAT8.candidates(normal(0, 4, 40), W, b, 5)
    assert uncertified(offered, torch.full((4,), 1e30), 1000).all()


def test_rows_that_lost_candidates_are_not_certified():
    offered = Candidates(torch.tensor([[3.0, torch.nan]]), torch.zeros(1, 2), torch.tensor([0.5]))
    assert uncertified(offered, torch.tensor([torch.inf]), 100).all()


@pytest.mark.parametrize("k", [1, 32, 64, 256])
@pytest.mark.parametrize("D", [768, 4096])
def test_candidates_fit_a_pool_that_the_network_sorts(k, D):
    count = n_float8_candidates(D, 1 << 20, k)
    assert count > k and pool_width(count) <= LARGEST_NETWORK
    assert n_float8_candidates(D, 40, 32) == 40


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
    offered = FLOAT8.candidates(x, W, b, 30)
    exact, _ = EXACT.exact_topk(x, W, b, 30)
    assert (~uncertified(offered, exact[:, -1], 4096)).float().mean() > 0.9
    assert_exact(FLOAT8, x, W, b, 30)


def massive_channel_case():
    """Return x, W, b with one massive channel, which eight biased latents read alone."""
    x, W, b = normal(0, 64, 768), normal(1, 4096, 768) / 768**0.5, torch.zeros(4096)
    x[:, 7] = 300 + 3 * normal(2, 64)
    W[100:108] = 0
    W[100:108, 7] = 1.0
    b[100:108] = -297.0 - torch.arange(8) * 0.25
    W[:100, 7] = W[108:, 7] = 0.0
    return x, W, b


@pytest.mark.parametrize("prefilter", PREFILTERS)
def test_latents_that_read_only_a_massive_channel(prefilter):
    x, W, b = massive_channel_case()
    assert_exact(prefilter, x, W, b, 32)


@needs_bfloat16
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
    assert not back[2, :-SLOTS].any() and back.isfinite().all()


def test_rows_without_a_float8_part_do_not_overflow():
    x, W = torch.zeros(9, 64), normal(1, 1000, 64) * 1e-3
    x[:, :8], W[:500, 8:] = normal(0, 9, 8) * 1e4, 0
    W[:, :8] *= 1e6
    assert_exact(FLOAT8, x, W, torch.zeros(1000), 8)
    for matrix, weights in zip((x, W), split_spec(x, W), strict=True):
        rows = split_rows(matrix, weights)
        # The product of two such rows, computed before rescaling, stays finite.
        assert rows.side.float().abs().max() <= 2.0**40


def test_a_row_without_a_finite_margin_is_never_certified():
    offered = Candidates(
        torch.zeros(2, 3), torch.zeros(2, 3).long(), torch.tensor([float("inf"), 1.0])
    )
    assert uncertified(offered, torch.full((2,), float("inf")), 100).tolist() == [True, False]


def test_a_certificate_needs_more_than_a_tie_with_the_margin():
    offered = Candidates(torch.tensor([[3.0, 1.0]]), torch.zeros(1, 2), torch.tensor([0.5]))
    assert not uncertified(offered, torch.tensor([1.5]), 100).any()
    assert uncertified(offered, torch.tensor([1.49]), 100).all()
    assert uncertified(offered, torch.tensor([float("nan")]), 100).all()
    assert not uncertified(offered, torch.tensor([0.0]), 2).any()  # all latents are candidates


class OnDevice(StockKernels):
    """Stock kernels with the interface of asynchronous ones; counts the calls."""

    asynchronous = True

    def __init__(self):
        super().__init__(torch.float32)
        self.encoded = 0
        self.rescored = []

    def exact_topk(self, x, W_enc, b_enc, k, rows=None):
        with no_mode():
            values, latents = super().exact_topk(x, W_enc, b_enc, k)
            if rows is not None:
                self.encoded = int(rows.size)
                unset = rows.indices[self.encoded :]
                values[unset], latents[unset] = torch.nan, -5
        return values, latents

    def decoder_dot(self, vectors, active, matrix):
        with no_mode():
            live = torch.ones(len(active.rows), dtype=torch.bool)
            if active.ends is not None:
                live = torch.arange(len(live)) < active.ends[active.rows]
                assert (active.latents[~live] == EMPTY).all()
            self.rescored.append(int(live.sum()))
            pairs = active._replace(latents=active.latents.clamp_min(0))
            return super().decoder_dot(vectors, pairs, matrix).masked_fill(~live, torch.nan)


def no_mode():
    return torch.utils._python_dispatch._disable_current_modes()


class NoWait(torch.utils._python_dispatch.TorchDispatchMode):
    """Fail at operations that wait for the device if their arguments are there."""

    WAITING = ("nonzero", "_local_scalar_dense", "masked_select", "repeat_interleave.Tensor")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function).removeprefix("aten.")
        assert not name.startswith(self.WAITING), f"the host waits in {name}"
        masks = args[1] if name.startswith("index") and isinstance(args[1], list | tuple) else ()
        assert all(mask is None or mask.dtype != torch.bool for mask in masks)
        return function(*args, **(kwargs or {}))


def selected_on_device(offered, x, W, b, k):
    """Select from fixed candidates with `OnDevice`, and return values, latents and the kernels."""

    class Fixed:
        name = "fixed"

        def candidates(self, *_):
            return offered

    exact = OnDevice()
    with NoWait():
        values, latents = prefiltered_topk(Fixed(), exact, x, W, b, k)
    return values, latents, exact


@pytest.mark.parametrize("outlier", [1.0, 100.0])
def test_rescoring_in_two_rounds_selects_the_same(outlier):
    x, W, b, k = normal(0, 30, 128), normal(1, 4000, 128), 0.1 * normal(2, 4000), 8
    x[:, 7] *= outlier
    W[50:] += 12 * W[49]  # so that some rows cannot be certified
    offered = FLOAT8.candidates(x, W, b, k)
    values, latents, exact = selected_on_device(offered, x, W, b, k)
    wanted_values, wanted = prefiltered_topk(FLOAT8, EXACT, x, W, b, k)
    assert torch.equal(latents, wanted) and torch.equal(values, wanted_values)

    scores = (x @ W.T + b).gather(1, offered.latents)
    first = scores[:, : 2 * k].topk(k, dim=1).values[:, -1]
    reaching = offered.values[:, 2 * k :] + offered.margin[:, None] >= first[:, None]
    failed = int(uncertified(offered, scores.topk(k, dim=1).values[:, -1], 4000).sum())
    assert exact.rescored == [30 * 2 * k, int(reaching.sum()), failed * k]
    assert exact.encoded == failed and 0 < failed < 30
    assert 0 < exact.rescored[1] < 0.8 * reaching.numel()


def test_rows_that_fail_are_encoded_again_on_the_device():
    x, W, b, k = normal(0, 9, 64), normal(1, 1000, 64), torch.zeros(1000), 5
    _, wanted = EXACT.exact_topk(x, W, b, k)
    _, poor = (x @ W.T).topk(500, largest=False)  # candidates that are all wrong
    values = torch.zeros(9, 500)
    values[3:, -1] = 1e9  # only the first three rows look certified
    poor[:3, :k] = wanted[:3]
    offered = Candidates(values, poor, torch.zeros(9))
    _, latents, exact = selected_on_device(offered, x, W, b, k)
    assert torch.equal(latents, wanted) and exact.encoded == 6
    assert exact.rescored == [9 * 2 * k, 6 * (500 - 2 * k), 6 * k]
    # A row without a finite margin fails in any case, so it skips the second round.
    offered.margin[4] = torch.nan
    _, latents, exact = selected_on_device(offered, x, W, b, k)
    assert torch.equal(latents, wanted) and exact.encoded == 6
    assert exact.rescored == [9 * 2 * k, 5 * (500 - 2 * k), 6 * k]


def test_the_second_round_takes_candidates_within_the_margin_of_the_first():
    x, W, b, k = torch.eye(2, 64), normal(1, 1000, 64).abs(), torch.zeros(1000), 1
    W[[5, 6, 7, 8], :2] = torch.tensor([[10.0], [9.0], [10.4], [11.0]])
    latents = torch.tensor([[5, 6, 7, 8, 9]] * 2)
    values = torch.tensor([[10.0, 9.9, 9.8, 9.4, 0.0]] * 2)
    offered = Candidates(values, latents, torch.tensor([0.5, 0.7]))
    found, best, exact = selected_on_device(offered, x, W, b, k)
    # In row 0, the last two candidates cannot reach 10; in row 1 only the last one cannot.
    assert found.tolist() == [[torch.tensor(10.4)], [11.0]] and best.tolist() == [[7], [8]]
    assert exact.rescored == [4, 3, 0]


@pytest.mark.parametrize("where", ["x", "W", "b"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("nan")])
def test_non_finite_values_on_the_device(where, value):
    x, W, b = normal(0, 4, 16), normal(1, 1000, 16), torch.zeros(1000)
    {"x": x[1], "W": W[500], "b": b}[where].view(-1)[3] = value
    offered = FLOAT8.candidates(x, W, b, 5)
    values, _, _ = selected_on_device(offered, x, W, b, 5)
    expected, _ = EXACT.exact_topk(x, W, b, 5)
    torch.testing.assert_close(values, expected, equal_nan=True)


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
