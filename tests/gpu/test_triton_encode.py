"""Cases for the Triton kernels, run by Triton's interpreter or on a GPU.

    TRITON_INTERPRET=1 python -m pytest tests/gpu   # without a GPU
    python -m pytest tests/gpu                      # on one

Small integers make every sum exact in every dtype, and ties common.
"""

from __future__ import annotations

import pytest
import torch
import triton

from foundation.errors import ConfigError
from sae_core.architectures.sparse_autoencode import (
    AuxInput,
    Dictionary,
    SparsePlan,
    sparse_autoencode,
)
from sae_core.errors import ShapeError
from sae_core.kernels import Kernels, compact, get_kernels, in_slots, subset_of
from sae_core.kernels.interface import EMPTY, Affine, SparseLatents
from sae_core.kernels.triton.body import TritonKernels

pytestmark = pytest.mark.gpu

INTERPRETED = bool(triton.knobs.runtime.interpret)
DEVICE = "cpu" if INTERPRETED else "cuda"
# The interpreter multiplies bfloat16 as raw bit patterns, so bfloat16 needs a GPU.
DTYPES = [torch.float32, torch.float16] + ([] if INTERPRETED else [torch.bfloat16])
REFERENCE = get_kernels("reference", torch.float64)
INF, NAN = float("inf"), float("nan")


def integers(shape: tuple[int, ...], seed: int, span: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-span, span + 1, shape, generator=generator).float().to(DEVICE)


def body(dtype: torch.dtype = torch.float32) -> TritonKernels:
    return TritonKernels(dtype)


def double_of(active: SparseLatents) -> SparseLatents:
    return active._replace(values=active.values.double())


def assert_same_selection(x, W, b, k, dtype=torch.float32):
    """Compare values, latents and their order (descending, ties by latent) with the reference."""
    values, latents = body(dtype).encode_topk(x.to(dtype), W.to(dtype), b, k)
    expected, expected_latents = REFERENCE.encode_topk(x.double(), W.double(), b.double(), k)
    assert values.dtype == torch.float32 and latents.dtype == torch.int64
    assert torch.equal(latents, expected_latents)
    torch.testing.assert_close(values.double(), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("B", "L", "D", "k"),
    [
        (40, 700, 72, 8),  # three segments; the last finds few per tile
        (33, 200, 40, 1),
        (5, 72, 200, 72),  # k = L
        (1, 129, 40, 3),  # a segment of one latent
        (3, 1500, 40, 40),
    ],
)
def test_selects_exactly_what_the_reference_selects(B, L, D, k, dtype):
    assert_same_selection(integers((B, D), 1), integers((L, D), 2), integers((L,), 3), k, dtype)


def test_duplicates_within_and_across_tiles_tie_to_the_lowest_latent():
    x, W, b = integers((20, 40), 1), integers((700, 40), 2), torch.zeros(700, device=DEVICE)
    for copy in (3, 4, 31, 32, 130, 131, 520, 699):
        W[copy], b[copy] = W[600], 50.0
    b[600] = 50.0
    assert_same_selection(x, W, b, 5)


@pytest.mark.parametrize("L", [72, 700])
def test_a_row_of_zeros_selects_the_lowest_latents(L):
    zeros = torch.zeros(3, 40, device=DEVICE)
    assert_same_selection(zeros, integers((L, 40), 2), torch.zeros(L, device=DEVICE), 4)


def test_fewer_than_k_positive_values():
    x, W = integers((9, 40), 1), integers((300, 40), 2)
    b = torch.full((300,), -1000.0, device=DEVICE)
    b[[7, 290]] = 1000.0
    assert_same_selection(x, W, b, 6)
    active = compact(*body().encode_topk(x, W, b, 6))
    assert len(active.values) == 18 and set(active.latents.tolist()) == {7, 290}


@pytest.mark.parametrize("k", [1, 4, 40])
def test_rows_that_rise_with_the_latent_overflow_their_pool_and_stay_exact(k):
    x, W = torch.ones(6, 40, device=DEVICE), torch.zeros(1200, 40, device=DEVICE)
    x[3:] = -1.0
    W[:, 0] = torch.arange(1200, device=DEVICE)
    assert_same_selection(x, W, torch.zeros(1200, device=DEVICE), k)


def test_a_row_that_overflowed_early_is_run_again_after_all_later_segments():
    x, W = torch.ones(3, 40, device=DEVICE), torch.zeros(1200, 40, device=DEVICE)
    W[:400, 0] = torch.arange(400, device=DEVICE)
    assert_same_selection(x, W, torch.zeros(1200, device=DEVICE), 4)


@pytest.mark.parametrize("slots", [16, 64])
def test_overflow_reduces_pools_in_pieces(monkeypatch, slots):
    monkeypatch.setattr("sae_core.kernels.triton.encoder.overflow._SLOTS", slots)
    x, W = integers((20, 40), 1), torch.zeros(700, 40, device=DEVICE)
    x[:, 0] = torch.arange(20, device=DEVICE) % 3 - 1  # rising, constant and falling rows
    W[:, 0] = torch.arange(700, device=DEVICE)
    W[:, 1] = integers((700,), 2)
    assert_same_selection(x, W, torch.zeros(700, device=DEVICE), 7)


def test_a_subset_of_the_latents():
    x, W, b = integers((9, 40), 1), integers((1500, 40), 2), integers((1500,), 3)
    for n, k in ((0, 5), (3, 5), (200, 5), (900, 5), (1500, 40)):
        mask = torch.zeros(1500, dtype=torch.bool, device=DEVICE)
        mask[torch.randperm(1500, generator=torch.Generator().manual_seed(n))[:n]] = True
        ours = body().encode_topk(x, W, b, k, subset_of(mask))
        theirs = REFERENCE.encode_topk(x.double(), W.double(), b.double(), k, subset_of(mask))
        assert torch.equal(ours[0].double(), theirs[0]) and torch.equal(ours[1], theirs[1])


def test_a_subset_of_the_latents_in_which_rows_overflow():
    x, W = torch.ones(6, 40, device=DEVICE), torch.zeros(1200, 40, device=DEVICE)
    x[3:] = -1.0
    W[:, 0] = torch.arange(1200, device=DEVICE)
    mask = torch.arange(1200, device=DEVICE) % 3 > 0
    ours = body().encode_topk(x, W, torch.zeros(1200, device=DEVICE), 4, subset_of(mask))
    best = [1199, 1198, 1196, 1195], [1, 2, 4, 5]
    assert ours[1].tolist() == [best[0]] * 3 + [best[1]] * 3


def test_a_subset_of_the_rows():
    x, W, b = integers((70, 40), 1), integers((700, 40), 2), integers((700,), 3)
    x[3], W[:, 0] = 1.0, torch.arange(700, device=DEVICE)  # an overflow in this row, too
    values, latents = body().exact_topk(x, W, b, 6)
    for chosen in ([], [3], [0, 3, 40, 69], list(range(70))):
        mask = torch.zeros(70, dtype=torch.bool, device=DEVICE)
        mask[chosen] = True
        again = body().exact_topk(x, W, b, 6, rows=subset_of(mask))
        assert torch.equal(again[0][mask], values[mask])
        assert torch.equal(again[1][mask], latents[mask])


def test_pairs_in_slots_give_the_results_of_compact_ones():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(9, 5, generator=generator).sort(1, descending=True).values.to(DEVICE)
    values[0], values[1], values[2, 0] = -1.0, values[1].abs(), NAN
    latents = torch.stack([torch.randperm(20, generator=generator)[:5] for _ in range(9)])
    W, x = integers((20, 40), 1), integers((9, 40), 2)
    padded, packed = (make(values, latents.to(DEVICE)) for make in (in_slots, compact))
    used = padded.latents != EMPTY
    assert padded.values[~used].eq(0).all() and len(padded.latents) == 45
    for ours, theirs in zip((part[used] for part in padded[:3]), packed[:3], strict=True):
        assert torch.equal(ours.nan_to_num(), theirs.nan_to_num())
    assert torch.equal(padded.ends - padded.offsets, packed.ends - packed.offsets)
    assert_equal(body().decode(padded, W), body().decode(packed, W))
    dots, wanted = body().decoder_dot(x, padded, W), body().decoder_dot(x, packed, W)
    assert_equal(dots[used], wanted)
    decoded, exact = body().decode_error(x, padded, W), body().decode_error(x, packed, W)
    assert_equal(decoded.error, exact.error)
    assert_equal(decoded.dots[used], exact.dots)
    dvalues = integers((45,), 3)
    gradients = body().row_gradients(padded, dvalues, x, x)
    for a, b in zip(gradients, body().row_gradients(packed, dvalues[used], x, x), strict=True):
        assert_equal(a, b)


def assert_equal(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


def test_nan_and_infinity_are_selected_not_dropped():
    x, W, b = integers((5, 40), 1), integers((700, 40), 2), torch.zeros(700, device=DEVICE)
    b[350], b[5], b[699], b[40] = NAN, INF, -NAN, -INF
    assert_same_selection(x, W, b, 4)
    assert compact(*body().encode_topk(x, W, b, 4)).values.isnan().any()


def test_a_row_with_nan_leaves_the_others_alone():
    x, W, b = integers((5, 40), 1), integers((700, 40), 2), integers((700,), 3)
    x[2, 7] = NAN
    x[4, 0] = INF
    assert_same_selection(x, W, b, 4)


def test_a_dictionary_of_minus_infinity():
    b = torch.full((300,), -INF, device=DEVICE)
    assert_same_selection(integers((5, 40), 1), integers((300, 40), 2), b, 4)


def test_a_pool_too_wide_for_the_network(monkeypatch):
    monkeypatch.setattr("sae_core.kernels.triton.encoder.select.LARGEST_NETWORK", 64)
    assert_same_selection(integers((5, 40), 1), integers((700, 40), 2), integers((700,), 3), 4)


def far_rows(n_rows: int, d_model: int, seed: int) -> torch.Tensor:
    """Return [n_rows, d_model] whose last rows begin past element 2**31; gaps stay untouched."""
    stride = (1 << 31) // (n_rows - 4)
    storage = torch.empty(stride * n_rows, dtype=torch.float16, device=DEVICE)
    rows = storage.as_strided((n_rows, d_model), (stride, 1))
    rows.copy_(integers((n_rows, d_model), seed))
    return rows


def test_offsets_past_two_to_the_31():
    W = far_rows(40, 40, 2)
    x, b = integers((3, 40), 1), torch.zeros(40, device=DEVICE)
    assert_same_selection(x, W, b, 40, torch.float16)
    active = compact(*body().encode_topk(x, W, b, 40))
    near = W.double()
    double = double_of(active)
    assert torch.equal(body().decode(active, W).double(), REFERENCE.decode(double, near))
    dots = REFERENCE.decoder_dot(x.double(), double, near)
    assert torch.equal(body().decoder_dot(x, active, W).double(), dots)
    far, per_row = far_rows(40, 40, 3), torch.arange(40, device=DEVICE)
    ones = torch.ones(40, device=DEVICE)
    pairs = SparseLatents(per_row, per_row % 3, ones, per_row, per_row + 1)
    sums = body().row_gradients(pairs, pairs.values, far, far)
    decoded = body().decode_error(far, pairs, W)
    theirs = REFERENCE.decode_error(far.double(), double_of(pairs), near)
    assert all(torch.equal(a.double(), b) for a, b in zip(decoded, theirs, strict=True))
    double = double_of(pairs)
    expected = REFERENCE.row_gradients(double, double.values, far.double(), far.double())
    assert torch.equal(sums.W_enc.double(), expected.W_enc)
    dots = REFERENCE.decoder_dot(far.double(), double, near)
    assert torch.equal(body().decoder_dot(far, pairs, W).double(), dots.to(far.dtype).double())


@pytest.mark.parametrize("weights", DTYPES, ids=str)
@pytest.mark.parametrize(("B", "L", "D", "k"), [(7, 60, 72, 9), (5, 30, 200, 30), (12, 8, 40, 1)])
def test_sparse_operations(B, L, D, k, weights):
    generator = torch.Generator().manual_seed(0)
    x, grad, W = (torch.randn(n, D, generator=generator).to(DEVICE, weights) for n in (B, B, L))
    active = compact(*REFERENCE.encode_topk(x.float(), W.float(), W.new_zeros(L).float(), k))
    exact = double_of(active)
    recon, dots = body().decode(active, W), body().decoder_dot(grad.float(), active, W)
    expected = REFERENCE.decode(exact, W.double())
    assert recon.dtype == torch.float32  # whatever the dtype of the dictionary's copy
    torch.testing.assert_close(recon.double(), expected, rtol=1e-4, atol=1e-4)
    expected = REFERENCE.decoder_dot(grad.double(), exact, W.double())
    torch.testing.assert_close(dots.double(), expected, rtol=1e-4, atol=1e-4)
    decoded = body().decode_error(x.float(), active, W)
    wanted = REFERENCE.decode_error(x.double(), exact, W.double())
    for part, expected in zip(decoded, wanted, strict=True):
        assert part.dtype == torch.float32
        torch.testing.assert_close(part.double(), expected, rtol=1e-4, atol=1e-4)
    ours = body().row_gradients(active, dots, x, grad)
    theirs = REFERENCE.row_gradients(exact, dots.double(), x.double(), grad.double())
    for part, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(part.double(), expected.double(), rtol=1e-4, atol=1e-4)


def test_rows_and_batches_without_active_pairs():
    values = torch.tensor([[0.0, 2.0], [0.0, -1.0], [3.0, 0.0]], device=DEVICE)
    active = compact(values, torch.tensor([[0, 1], [2, 3], [3, 0]], device=DEVICE))
    W = integers((4, 72), 0)
    assert torch.equal(body().decode(active, W), torch.stack([2 * W[1], 0 * W[0], 3 * W[3]]))
    decoded = body().decode_error(W[:3], active, W)
    expected = REFERENCE.decode_error(W[:3].double(), double_of(active), W.double())
    assert all(torch.equal(a.double(), b) for a, b in zip(decoded, expected, strict=True))
    none = compact(-torch.ones(3, 2, device=DEVICE), active.latents.new_zeros(3, 2))
    assert not body().decode(none, W).any()
    assert not len(body().decoder_dot(W[:3], none, W))
    assert torch.equal(body().decode_error(W[:3], none, W).error, W[:3])
    empty = compact(torch.ones(0, 2, device=DEVICE), active.latents.new_zeros(0, 2))
    nothing = body().decode_error(W[:0], empty, W)
    assert [tuple(part.shape) for part in nothing] == [(0, 72), (0,), (), (72,)]
    gradients = body().row_gradients(none, none.values, W[:3], W[:3])
    assert [tuple(part.shape) for part in gradients] == [(0,), (0, 72), (0, 72), (0,)]


def test_a_hot_latent_is_summed_in_pieces_to_the_same_bits(monkeypatch):
    monkeypatch.setattr("sae_core.kernels.triton.segments.PIECE", 16)
    generator = torch.Generator().manual_seed(0)
    B, D = 50, 40
    x, grad = (torch.randn(B, D, generator=generator).to(DEVICE) for _ in range(2))
    # Latents 2 and 9 fire on every row, the others on one.
    latents = torch.tensor([[9, 2, 20 + row] for row in range(B)], device=DEVICE)
    active = compact(torch.rand(B, 3, generator=generator).to(DEVICE) + 0.1, latents)
    first = body().row_gradients(active, -active.values, x, grad)
    expected = REFERENCE.row_gradients(active, -active.values, x, grad)
    for part, other in zip(first, expected, strict=True):
        torch.testing.assert_close(part, other, rtol=1e-5, atol=1e-5)
    again = body().row_gradients(active, -active.values, x, grad)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_a_whole_step_gives_the_gradients_of_the_stock_body():
    B, L, D, k = 12, 60, 40, 5
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(B, D, generator=generator).to(DEVICE)
    rows = [torch.randn(L, D, generator=generator).to(DEVICE) for _ in range(2)]
    weights = (rows[0], torch.zeros(L), rows[1] / rows[1].norm(dim=1, keepdim=True), torch.ones(D))
    dead = subset_of(torch.arange(L, device=DEVICE) >= 50)
    results = []
    bodies: list[Kernels] = [body(), get_kernels("stock", torch.float32)]
    for kernels in bodies:
        own = [part.to(DEVICE).clone().requires_grad_() for part in weights]
        plan = SparsePlan(kernels, L, k, 4, 0, None)
        out = sparse_autoencode(x, Dictionary(*own), plan, AuxInput(dead, None))
        assert out.aux_squared_error is not None
        (out.squared_error + out.aux_squared_error / 32).backward()
        results.append([out.squared_error, out.aux_squared_error, *(part.grad for part in own)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_matrices_that_are_not_contiguous():
    x, grad, W = (integers((n, 40), n) for n in (5, 6, 30))
    grad = grad[:5]
    active = compact(*REFERENCE.encode_topk(x, W, torch.zeros(30, device=DEVICE), 4))

    def turned(matrix):
        return matrix.T.contiguous().T

    assert torch.equal(body().decode(active, turned(W)), body().decode(active, W))
    dots = body().decoder_dot(grad, active, W)
    assert torch.equal(body().decoder_dot(turned(grad), active, turned(W)), dots)
    pairs = zip(
        (
            *body().decode_error(turned(x), active, turned(W)),
            *body().row_gradients(active, dots, turned(x), turned(grad)),
        ),
        (*body().decode_error(x, active, W), *body().row_gradients(active, dots, x, grad)),
        strict=True,
    )
    assert all(torch.equal(ours, wanted) for ours, wanted in pairs)


def test_dtype_of_low_precision_copies():
    assert body(torch.float16).copy_dtype == torch.float16
    assert body(torch.float32).copy_dtype is None


def test_unsupported_inputs_are_refused():
    with pytest.raises(ConfigError, match="bfloat16, float16 or float32"):
        TritonKernels(torch.float64)
    with pytest.raises(ConfigError, match="ieee or tf32"):
        TritonKernels(torch.float32, precision="fast")
    x = torch.ones(2, 3, device=DEVICE)
    with pytest.raises(ShapeError, match="kernels=reference for float64"):
        body().decode(compact(x, x.long()), x.double())
    assert [part.shape for part in body().encode_topk(x, x, x[:, 0], 0)] == [(2, 0), (2, 0)]
    with pytest.raises(ShapeError, match=r"d_model=9000: .* at most 8192"):
        wide = torch.ones(2, 9000, device=DEVICE)
        body().decode_error(wide, compact(x, x.long()), wide)
    with pytest.raises(ShapeError, match="k=4, L=2"):
        body().encode_topk(x, x, x[:, 0], 4)
    if INTERPRETED:
        with pytest.raises(ConfigError, match="raw bit patterns"):
            TritonKernels(torch.bfloat16)


@pytest.mark.parametrize("raw_dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("rounded", [None, torch.float16], ids=str)
def test_inputs_are_centred_and_subtracted_in_one_pass(monkeypatch, raw_dtype, rounded):
    """Rounded rows are float16 here, because the interpreter truncates bfloat16."""
    B, L, D = 37, 20, 72
    generator = torch.Generator().manual_seed(0)
    raw = (5 + 3 * torch.randn(B, D, generator=generator)).to(DEVICE, raw_dtype)
    affine = Affine(raw.float().mean(0), raw.new_full((), 0.3, dtype=torch.float32), raw[0].float())
    kernels = body()
    monkeypatch.setattr(kernels, "gather_dtype", rounded)
    ours = kernels.centre(raw, affine)
    theirs = REFERENCE.centre(raw.double(), Affine(*(part.double() for part in affine)))
    assert ours.rows.dtype == (rounded or torch.float32)
    assert_near(ours.rows, theirs.rows, 1e-3 if rounded else 1e-5)
    assert_near(ours.total, theirs.total, 1e-4)
    assert_near(ours.square, theirs.square, 1e-5)

    W = torch.randn(L, D, generator=generator).to(DEVICE)
    values = torch.rand(B, 3, generator=generator).to(DEVICE).sort(1, descending=True).values
    latents = torch.stack([torch.randperm(L, generator=generator)[:3] for _ in range(B)])
    active = compact(values, latents.to(DEVICE))
    recon = kernels.decode(active, W)
    for decoded in (kernels.decode_error(ours, active, W), kernels.subtract(ours, recon)):
        wanted = REFERENCE.decode_error(theirs, double_of(active), W.double())
        assert decoded.error.dtype == (rounded or torch.float32)
        assert_near(decoded.error, wanted.error, 1e-3 if rounded else 1e-5)
        # Sums and dot products are those of the error before it is rounded.
        assert_near(decoded.square, wanted.square, 1e-5)
        assert_near(decoded.total, wanted.total, 1e-4)
        if len(decoded.dots):
            assert_near(decoded.dots, wanted.dots, 1e-4)
    plain = kernels.subtract(raw, recon)
    assert_near(plain.error, raw.double() - recon.double(), 1e-3 if rounded else 1e-5)


def assert_near(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float) -> None:
    torch.testing.assert_close(ours.double(), theirs, rtol=tolerance, atol=tolerance)
