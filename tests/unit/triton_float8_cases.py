"""What the float8 product must give; run by `test_triton_interpreter`, and on a GPU as they are."""

from __future__ import annotations

import pytest
import torch

from sae_core.errors import ShapeError
from sae_core.kernels.triton_body import TritonKernels
from sae_core.kernels.triton_quantise import FP8, quantise_rows
from tests.unit.triton_cases import DEVICE, DTYPES, INTERPRETED, REFERENCE, body, far_rows, integers


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def dequantised(matrix: torch.Tensor) -> torch.Tensor:
    rows, scales = quantise_rows(matrix)
    return rows.double() * scales.double()[:, None]


@pytest.mark.parametrize("dtype", [*DTYPES, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("n", "D"), [(5, 72), (1, 40), (37, 200), (0, 40)])
def test_rows_are_rounded_as_torch_rounds_them(n, D, dtype):
    matrix = normal(n, D, seed=n).to(dtype)
    matrix[1:2] *= 1e-4  # most of it subnormal
    matrix[2:3, 0] = 30000.0  # an outlier, beside which nearly all is
    matrix[3:4] = 0.0
    rows, scales = quantise_rows(matrix)
    assert rows.dtype == FP8 and scales.dtype == torch.float32
    expected = matrix.float().abs().amax(1).clamp_min(1e-30) / 448
    assert torch.equal(scales, expected)
    assert torch.equal(rows.float(), (matrix.float() / expected[:, None]).to(FP8).float())
    assert not rows[3:4].float().any()


def test_every_float8_number_is_kept():
    numbers = torch.arange(256, dtype=torch.uint8).view(FP8).float()
    numbers = numbers[numbers.isfinite()][None].to(DEVICE)
    rows, scales = quantise_rows(numbers)
    assert scales.item() == 1 and torch.equal(rows.float(), numbers)


def test_a_row_is_rounded_alike_wherever_it_lies():
    matrix = normal(9, 72, seed=0)
    spread = torch.empty(9, 100, device=DEVICE)[:, :72].copy_(matrix)
    for ours, other in zip(quantise_rows(spread), quantise_rows(matrix), strict=True):
        assert torch.equal(ours.float(), other.float())
    turned = quantise_rows(matrix.T.contiguous().T)
    assert torch.equal(turned[0].float(), quantise_rows(matrix)[0].float())


@pytest.mark.parametrize(
    ("B", "L", "D", "count"),
    [(40, 700, 72, 8), (33, 200, 40, 1), (5, 72, 200, 72), (3, 900, 40, 40)],
)
def test_selects_what_the_rounded_product_selects(B, L, D, count):
    # With 448 in every row the scale is 1 and small multiples of 64 stay: exact sums, many ties.
    x, W, b = integers((B, D), 1, 7) * 64, integers((L, D), 2, 7) * 64, integers((L,), 3)
    x[:, 0], W[:, 0] = 448.0, 448.0
    b *= 4096
    values, latents = body().approx_topk(x, W, b, count)
    expected, expected_latents = REFERENCE.encode_topk(x.double(), W.double(), b.double(), count)
    assert values.dtype == torch.float32 and latents.dtype == torch.int64
    assert torch.equal(latents, expected_latents)
    assert torch.equal(values.double(), expected)


def test_values_are_those_of_the_rounded_inputs():
    x, W, b = normal(20, 72, seed=1), normal(600, 72, seed=2) * 0.01, normal(600, seed=3) * 0.01
    x[:, 5] *= 100.0  # an outlier channel
    x[3], W[7] = 0.0, 0.0
    values, latents = body().approx_topk(x, W, b, 30)
    rounded = dequantised(x) @ dequantised(W).T + b.double()
    # The device's sums have about 14 bits.
    tolerance = 1e-5 if INTERPRETED else 1e-3
    reach = (dequantised(x).norm(dim=1)[:, None] * dequantised(W).norm(dim=1)[latents]).amax(1)
    gap = (values.double() - rounded.gather(1, latents)).abs().amax(1)
    assert (gap <= tolerance * (reach + 1e-3)).all()
    wanted = rounded.topk(30).values
    assert ((values.double() - wanted).abs().amax(1) <= 2 * tolerance * (reach + 1e-3)).all()
    assert (values.diff(dim=1) <= 0).all()


def test_behind_the_prefilter_the_same_latents_are_selected():
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
    _, latents = body().approx_topk(x, W, b, 512)
    assert all(len(set(row.tolist())) == 512 for row in latents)
    best = (x @ W.T).topk(128).indices
    assert all(
        set(top.tolist()) <= set(row.tolist()) for top, row in zip(best, latents, strict=True)
    )


def test_rows_that_overflow_their_pool_are_run_again():
    # One number per row: it is its own scale, and the product is exact. Odd rows overflow.
    x, W = torch.zeros(6, 40, device=DEVICE), torch.zeros(1200, 40, device=DEVICE)
    x[:, 0] = torch.tensor([-1.0, 2.0, -4.0, 8.0, -16.0, 32.0], device=DEVICE)
    W[:, 0] = torch.arange(1, 1201, device=DEVICE)
    values, latents = body().approx_topk(x, W, torch.zeros(1200, device=DEVICE), 5)
    for row in (1, 3, 5):
        assert latents[row].tolist() == [1199, 1198, 1197, 1196, 1195]
        expected = x[row, 0] * torch.arange(1200.0, 1195.0, -1, device=DEVICE)
        torch.testing.assert_close(values[row], expected)
    assert latents[4].tolist() == [0, 1, 2, 3, 4]


def test_infinity_and_nan_of_the_bias():
    x, W, b = normal(4, 40, seed=1), normal(300, 40, seed=2), torch.zeros(300, device=DEVICE)
    b[[7, 250]] = torch.tensor([float("nan"), float("inf")], device=DEVICE)
    _, latents = body().approx_topk(x, W, b, 3)
    assert (latents[:, :2] == torch.tensor([7, 250], device=DEVICE)).all()


@pytest.mark.skipif(INTERPRETED, reason="the interpreter makes a number of a float8 NaN")
def test_nan_of_the_inputs_is_selected():
    x, W, b = normal(4, 40, seed=1), normal(300, 40, seed=2), torch.zeros(300, device=DEVICE)
    W[123, 3], x[2, 0] = float("nan"), float("inf")
    values, latents = body().approx_topk(x, W, b, 3)
    assert (latents[:, 0] == torch.tensor([123, 123, 0, 123], device=DEVICE)).all()
    assert values[:, 0].isnan().all()


def test_offsets_past_two_to_the_31():
    W = far_rows(40, 40, 2)
    W[:, 0] = 7.0
    x, b = integers((3, 40), 1), torch.zeros(40, device=DEVICE)
    x[:, 0] = 7.0
    values, latents = body().approx_topk(x, W, b, 40)
    expected, expected_latents = REFERENCE.encode_topk(x.double(), W.double(), b.double(), 40)
    assert torch.equal(latents, expected_latents)
    torch.testing.assert_close(values.double(), expected)


def test_nothing_to_select():
    x = torch.ones(2, 40, device=DEVICE)
    assert [part.shape for part in body().approx_topk(x, x, x[:, 0], 0)] == [(2, 0), (2, 0)]
    with pytest.raises(ShapeError, match="k=4, L=2"):
        body().approx_topk(x, x, x[0, :2], 4)
