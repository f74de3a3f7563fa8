"""Cases for the float8 product, run by Triton's interpreter or on a GPU."""

from __future__ import annotations

import pytest
import torch

from sae_core.errors import ShapeError
from sae_core.kernels.triton.body import TritonKernels
from sae_core.kernels.triton.prefilter_float8 import (
    PROMOTED,
    SLOTS,
    SUM_WIDTH,
    SplitRows,
    SplitSpec,
    dequantise,
    split_spec,
)
from sae_core.kernels.triton.prefilter_float8 import split_rows as plain_split_rows
from sae_core.kernels.triton.quantise import FP8, split_rows
from tests.gpu.test_triton_encode import (
    DEVICE,
    DTYPES,
    INTERPRETED,
    REFERENCE,
    body,
    far_rows,
    integers,
)

pytestmark = pytest.mark.gpu


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def both(x: torch.Tensor, W: torch.Tensor) -> tuple[SplitRows, SplitRows]:
    x_weights, W_weights = split_spec(x, W)
    return split_rows(x, x_weights), split_rows(W, W_weights)


def unbounded(rows: SplitRows) -> SplitRows:
    """Return `rows` with the columns that carry bounds set to zero."""
    side = rows.side.clone()
    side[:, -SLOTS:] = 0
    return rows._replace(side=side)


def approximate_topk(x, W, b, count):
    x_rows, W_rows = both(x, W)
    return body().bounded_topk(unbounded(x_rows), unbounded(W_rows), b, count)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("n", "D"), [(5, 72), (1, 40), (37, 200), (0, 40), (4, 1), (3, 600)])
def test_rows_are_split_as_torch_splits_them(n, D, dtype):
    matrix = normal(n, D, seed=n).to(dtype)
    matrix[1:2] *= 1e-4
    matrix[2:3, 0] = 30000.0  # an outlier that dwarfs the rest of its row
    matrix[3:4] = 0.0
    dictionary = normal(50, D, seed=9)
    matrix[4:5, split_spec(matrix, dictionary)[0].channels[:-1]] = 0.0  # no float8 part
    for weights in split_spec(matrix, dictionary):
        ours, wanted = split_rows(matrix, weights), plain_split_rows(matrix, weights)
        assert torch.equal(ours.scales, wanted.scales)
        assert ours.low.dtype == FP8 and torch.equal(ours.low.float(), wanted.low.float())
        assert torch.equal(ours.side[:, :-SLOTS].float(), wanted.side[:, :-SLOTS].float())
        # The sums run in another order, so bfloat16 may round the other way.
        bounds = (part.side[:, -SLOTS:].float() for part in (ours, wanted))
        torch.testing.assert_close(*bounds, rtol=2.0**-7, atol=1e-30)


def test_every_float8_number_is_kept():
    numbers = torch.arange(256, dtype=torch.uint8).view(FP8).float()
    numbers = numbers[numbers.isfinite()].abs()[None].to(DEVICE)
    D = numbers.shape[1]
    flat = torch.ones(D, device=DEVICE)
    weights = SplitSpec(torch.arange(D, device=DEVICE), 0, flat, flat, 6.0, 1.0)
    rows = split_rows(numbers / 2, weights)
    assert rows.scales.item() == 1 and torch.equal(
        rows.low[:, :D].float() * 2, (numbers / 2).to(FP8).float() * 2
    )


def test_split_rows_do_not_depend_on_the_memory_layout():
    matrix = normal(9, 72, seed=0)
    weights, _ = split_spec(matrix, matrix)
    spread = torch.empty(9, 100, device=DEVICE)[:, :72].copy_(matrix)
    for other in (spread, matrix.T.contiguous().T):
        parts = zip(split_rows(other, weights), split_rows(matrix, weights), strict=True)
        assert all(torch.equal(a.float(), b.float()) for a, b in parts)


@pytest.mark.parametrize(
    ("B", "L", "D", "count"),
    [(40, 700, 72, 8), (33, 200, 40, 1), (5, 72, 200, 72), (3, 900, 600, 40)],
)
def test_selects_what_the_split_product_selects(B, L, D, count):
    # Both parts represent small integers exactly: exact sums, many ties.
    x, W, b = integers((B, D), 1, 7), integers((L, D), 2, 7), integers((L,), 3)
    values, latents = approximate_topk(x, W, b, count)
    expected, expected_latents = REFERENCE.encode_topk(x.double(), W.double(), b.double(), count)
    assert values.dtype == torch.float32 and latents.dtype == torch.int64
    assert torch.equal(latents, expected_latents)
    assert torch.equal(values.double(), expected)


def test_values_are_those_of_the_rounded_inputs_and_the_bounds():
    x, W, b = normal(20, 72, seed=1), normal(600, 72, seed=2) * 0.01, normal(600, seed=3) * 0.01
    x[:, 5] *= 100.0  # an outlier channel
    x[3], W[7] = 0.0, 0.0
    low_x, low_W = both(x, W)
    values, latents = body().bounded_topk(low_x, low_W, b, 30)
    rounded = dequantise(low_x).double() @ dequantise(low_W).double().T + b.double()
    # The device's sums are accurate to about 14 bits.
    tolerance = 1e-5 if INTERPRETED else 1e-3
    reach = (x.norm(dim=1)[:, None] * W.norm(dim=1)[latents]).amax(1)
    gap = (values.double() - rounded.gather(1, latents)).abs().amax(1)
    assert (gap <= tolerance * (reach + 1e-3)).all()
    wanted = rounded.topk(30).values
    assert ((values.double() - wanted).abs().amax(1) <= 2 * tolerance * (reach + 1e-3)).all()
    assert (values.diff(dim=1) <= 0).all()
    true = x.double() @ W.double().T + b.double()
    assert (values.double() >= true.gather(1, latents)).all()


@pytest.mark.parametrize("kind", ["normal", "positive", "half lost"])
@pytest.mark.parametrize("D", [768] if INTERPRETED else [768, 4096])
def test_float8_sums_lose_no_more_than_their_bound(kind, D):
    x, W, b = normal(9, D, seed=1), normal(64, D, seed=2), torch.zeros(64, device=DEVICE)
    if kind != "normal":
        x, W = x.abs(), W.abs()
    if kind == "half lost":
        # A large running sum from the first step of every promotion cuts off later products.
        x[:, torch.arange(D) % PROMOTED >= SUM_WIDTH] /= 16
        W[:, torch.arange(D) % PROMOTED >= SUM_WIDTH] /= 16
    rows, latents = both(x, W)
    values, order = body().bounded_topk(unbounded(rows), unbounded(latents), b, 64)
    exact = dequantise(unbounded(rows)).double() @ dequantise(unbounded(latents)).double().T
    bounds = (dequantise(m)[:, -1].double() for m in (rows, latents))
    bound = next(bounds)[:, None] * next(bounds)
    float32_sums = 1e-6 * x.norm(dim=1)[:, None] * W.norm(dim=1)
    loss = (values.double() - exact.gather(1, order)).abs()
    assert (loss <= (bound + float32_sums).gather(1, order)).all()


def test_the_prefilter_selects_the_same_latents():
    x, W, b = normal(20, 72, seed=1), normal(600, 72, seed=2), normal(600, seed=3)
    kernels = TritonKernels(torch.float32, float8_prefilter=True)
    values, latents = kernels.encode_topk(x, W, b, 8)
    expected, expected_latents = body().encode_topk(x, W, b, 8)
    assert torch.equal(latents.sort(1).values, expected_latents.sort(1).values)
    torch.testing.assert_close(values.sort(1).values, expected.sort(1).values)
    assert [part.shape for part in kernels.encode_topk(x, W, b, 0)] == [(20, 0), (20, 0)]
    assert [part.shape for part in kernels.encode_topk(x[:0], W, b, 8)] == [(0, 8), (0, 8)]


def test_512_candidates():
    x, W, b = normal(3, 40, seed=1), normal(5000, 40, seed=2), torch.zeros(5000, device=DEVICE)
    _, latents = approximate_topk(x, W, b, 512)
    assert all(len(set(row.tolist())) == 512 for row in latents)
    best = (x @ W.T).topk(128).indices
    assert all(
        set(top.tolist()) <= set(row.tolist()) for top, row in zip(best, latents, strict=True)
    )


def test_rows_that_overflow_their_pool_are_run_again():
    # One number per row, exact in bfloat16, so the product is exact. Odd rows overflow.
    x, W = torch.zeros(6, 40, device=DEVICE), torch.zeros(1200, 40, device=DEVICE)
    x[:, 0] = torch.tensor([-1.0, 2.0, -4.0, 8.0, -16.0, 32.0], device=DEVICE)
    W[:, 0] = (torch.arange(1200, dtype=torch.int16) + 0x3F80).view(torch.bfloat16).to(DEVICE)
    values, latents = approximate_topk(x, W, torch.zeros(1200, device=DEVICE), 5)
    for row in (1, 3, 5):
        assert latents[row].tolist() == [1199, 1198, 1197, 1196, 1195]
        assert torch.equal(values[row], x[row, 0] * W[latents[row], 0])
    assert latents[4].tolist() == [0, 1, 2, 3, 4]


def test_infinity_and_nan_of_the_bias():
    x, W, b = normal(4, 40, seed=1), normal(300, 40, seed=2), torch.zeros(300, device=DEVICE)
    b[[7, 250]] = torch.tensor([float("nan"), float("inf")], device=DEVICE)
    _, latents = approximate_topk(x, W, b, 3)
    assert (latents[:, :2] == torch.tensor([7, 250], device=DEVICE)).all()


@pytest.mark.skipif(INTERPRETED, reason="the interpreter turns a float8 NaN into a number")
def test_nan_of_the_inputs_is_selected():
    x, W, b = normal(4, 40, seed=1), normal(300, 40, seed=2), torch.zeros(300, device=DEVICE)
    W[123, 3], x[2, 0] = float("nan"), float("inf")
    values, latents = approximate_topk(x, W, b, 3)
    assert (latents[:, 0] == torch.tensor([123, 123, 0, 123], device=DEVICE)).all()
    assert values[:, 0].isnan().all()


def test_offsets_past_two_to_the_31():
    W = far_rows(40, 40, 2)
    W[:, 0] = 7.0
    x, b = integers((3, 40), 1), torch.zeros(40, device=DEVICE)
    x[:, 0] = 7.0
    values, latents = approximate_topk(x, W, b, 40)
    expected, expected_latents = REFERENCE.encode_topk(x.double(), W.double(), b.double(), 40)
    assert torch.equal(latents, expected_latents)
    torch.testing.assert_close(values.double(), expected)


def test_nothing_to_select():
    x = torch.ones(2, 40, device=DEVICE)
    rows = both(x, x)
    assert [part.shape for part in body().bounded_topk(*rows, x[:, 0], 0)] == [(2, 0), (2, 0)]
    with pytest.raises(ShapeError, match="k=4, L=2"):
        body().bounded_topk(*rows, x[0, :2], 4)
