"""Cases for the fused update, run by Triton's interpreter or on a GPU."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from sae_core.errors import ShapeError
from sae_core.kernels import EMPTY, AdamStep, RowState, SparseGradient, SparseLatents, compact
from sae_core.kernels.rounding import round_stochastically_, salt_of
from sae_core.kernels.stock.body import StockKernels
from sae_core.kernels.triton.update import TritonRowUpdate, round_stochastically
from sae_core.kernels.triton.update import salt_of as triton_salt_of
from tests.gpu.test_triton_encode import DEVICE, INTERPRETED, REFERENCE, body, double_of, far_rows

pytestmark = pytest.mark.gpu

# The interpreter truncates bfloat16 copies instead of rounding them; float16 it rounds.
COPIES = torch.float16 if INTERPRETED else torch.bfloat16


@triton.jit
def rounding_kernel(source, target, step, first_row, D, BD: tl.constexpr, ARRAY: tl.constexpr):
    row = tl.program_id(0)
    columns = tl.arange(0, BD)
    inside = columns < D
    value = tl.load(source + row * D + columns, mask=inside, other=0.0)
    salt = triton_salt_of(tl.load(step), ARRAY)
    value = round_stochastically(value, (first_row + row).to(tl.int32), columns, salt)
    tl.store(target + row * D + columns, value.to(tl.bfloat16), mask=inside)


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def unit(rows: torch.Tensor) -> torch.Tensor:
    return rows / rows.norm(dim=1, keepdim=True)


def gradient_of(B: int, L: int, D: int, k: int, hot: int = 0) -> SparseGradient:
    """Return a gradient of the lower half of the latents; the first `hot` fire on every row."""
    generator = torch.Generator().manual_seed(0)
    latents = torch.stack([torch.randperm((L + 1) // 2, generator=generator)[:k] for _ in range(B)])
    # A latent occurs at most once per row, so the hot ones swap places with those drawn.
    for i in range(hot):
        latents = torch.where(latents == i, latents[:, i : i + 1], latents)
        latents[:, i] = i
    values = torch.rand(B, k, generator=generator) + 0.1
    pairs = compact(values.to(DEVICE), latents.to(DEVICE))
    dvalues = normal(len(pairs.rows), seed=1)
    return SparseGradient(pairs, dvalues, normal(B, D, seed=2), normal(B, D, seed=3), B)


def state_of(
    L: int, D: int, moments: torch.dtype = torch.float32, copies: torch.dtype | None = None
) -> RowState:
    shapes = ((L, D), (L, D), (L,))
    first = tuple(0.1 * normal(*shape, seed=10 + i) for i, shape in enumerate(shapes))
    second = tuple(normal(*shape, seed=20 + i).square() for i, shape in enumerate(shapes))

    def kept(parts):
        return (parts[0].to(moments), parts[1].to(moments), parts[2])

    W_enc, W_dec = normal(L, D, seed=30), unit(normal(L, D, seed=31))
    beside = None if copies is None else (W_enc.to(copies), W_dec.to(copies))
    return RowState(W_enc, W_dec, normal(L, seed=32), kept(first), kept(second), beside, 7)


def adam_of(skip: float = 0.0, divisor: float | None = None, beta1: float = 0.9) -> AdamStep:
    by = None if divisor is None else torch.tensor(divisor, device=DEVICE)
    step, skip_flag = torch.tensor(3.0, device=DEVICE), torch.tensor(skip, device=DEVICE)
    return AdamStep(1e-2, beta1, 0.999, 6.25e-10, step, by, skip_flag)


def flat(state: RowState) -> list[torch.Tensor]:
    rows = [state.W_enc, state.W_dec, state.b_enc, *state.exp_avg, *state.exp_avg_sq]
    return rows + list(state.copies or ())


def row_state(parts: list[torch.Tensor], first_latent: int) -> RowState:
    """Return the state whose parts `flat` lists."""
    W_enc, W_dec, b_enc = parts[:3]
    exp_avg, exp_avg_sq = (parts[3], parts[4], parts[5]), (parts[6], parts[7], parts[8])
    copies = (parts[9], parts[10]) if len(parts) > 9 else None
    return RowState(W_enc, W_dec, b_enc, exp_avg, exp_avg_sq, copies, first_latent)


def clone(state: RowState) -> RowState:
    return row_state([part.clone() for part in flat(state)], state.first_latent)


def exact(state: RowState) -> RowState:
    return row_state([part.double() for part in flat(state)[:9]], state.first_latent)


def exact_gradient(gradient: SparseGradient) -> SparseGradient:
    return gradient._replace(
        pairs=double_of(gradient.pairs),
        dvalues=gradient.dvalues.double(),
        x=gradient.x.double(),
        error=gradient.error.double(),
    )


@pytest.mark.parametrize("divisor", [None, 3.5])
@pytest.mark.parametrize(("B", "L", "D", "k"), [(9, 40, 72, 5), (5, 30, 40, 15), (4, 6, 200, 1)])
def test_update(B, L, D, k, divisor):
    gradient, state = gradient_of(B, L, D, k), state_of(L, D)
    theirs = exact(state)
    update = body().row_update(gradient, state.W_dec)
    expected = REFERENCE.row_update(exact_gradient(gradient), theirs.W_dec)
    torch.testing.assert_close(update.square().double(), expected.square(), rtol=1e-5, atol=0)
    update.apply(state, adam_of(divisor=divisor))
    expected.apply(theirs, adam_of(divisor=divisor))
    for ours, wanted in zip(flat(state), flat(theirs), strict=True):
        torch.testing.assert_close(ours.double(), wanted, rtol=1e-5, atol=1e-6)
    assert (state.W_dec.norm(dim=1) - 1).abs().max() < 1e-6


def test_a_latent_without_pairs_moves_with_its_decaying_moments():
    gradient, state = gradient_of(5, 30, 40, 3), state_of(30, 40)
    before = clone(state)
    body().row_update(gradient, state.W_dec).apply(state, adam_of())
    torch.testing.assert_close(state.exp_avg[0][29], 0.9 * before.exp_avg[0][29])
    assert (state.W_enc[29] - before.W_enc[29]).abs().min() > 0


@pytest.mark.parametrize("beta1", [0.0, 0.4, 0.5])
def test_a_first_moment_nearer_to_the_gradient(beta1):
    gradient, state = gradient_of(5, 30, 40, 3), state_of(30, 40)
    state.exp_avg[0].mul_(1e7)  # so large that the gradient would be lost
    theirs = exact(state)
    body().row_update(gradient, state.W_dec).apply(state, adam_of(beta1=beta1))
    expected = REFERENCE.row_update(exact_gradient(gradient), theirs.W_dec)
    expected.apply(theirs, adam_of(beta1=beta1))
    for ours, wanted in zip(flat(state), flat(theirs), strict=True):
        torch.testing.assert_close(ours.double(), wanted, rtol=1e-5, atol=1e-6)


def test_copies_are_the_masters_rounded():
    gradient, state = gradient_of(5, 30, 40, 3), state_of(30, 40, copies=COPIES)
    body().row_update(gradient, state.W_dec).apply(state, adam_of())
    assert state.copies is not None
    for copy, master in zip(state.copies, (state.W_enc, state.W_dec), strict=True):
        assert torch.equal(copy, master.to(COPIES))


def test_a_skipped_update_leaves_everything():
    gradient = gradient_of(5, 30, 40, 3)
    gradient.x[:] = float("nan")
    state = state_of(30, 40, torch.bfloat16, COPIES)
    state.W_dec.mul_(1.5)
    before = clone(state)
    body().row_update(gradient, state.W_dec).apply(state, adam_of(skip=1.0))
    assert all(torch.equal(a, b) for a, b in zip(flat(state), flat(before), strict=True))


def test_hot_latents_are_summed_in_pieces_to_the_same_bits(monkeypatch):
    B, L, D = 50, 30, 40
    gradient = gradient_of(B, L, D, 4, hot=2)
    whole, once, twice = state_of(L, D), state_of(L, D), state_of(L, D)
    update = body().row_update(gradient, whole.W_dec)
    square = update.square()
    update.apply(whole, adam_of())
    for module in ("segments", "update"):
        monkeypatch.setattr(f"sae_core.kernels.triton.{module}.PIECE", 16)
    for state in (once, twice):
        update = body().row_update(gradient, state.W_dec)
        assert isinstance(update, TritonRowUpdate)
        assert update.segments.piece_ends[-1] == 8 <= len(update.segments.dec) < B
        torch.testing.assert_close(update.square(), square)
        update.apply(state, adam_of())
    for a, b, c in zip(flat(whole), flat(once), flat(twice), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        assert torch.equal(b, c)


def test_the_norm_of_a_gradient_that_is_nearly_along_its_rows():
    """Projection leaves a millionth of the gradient, which must not be lost to cancellation."""
    L, D = 6, 72
    state = state_of(L, D)
    rows = torch.arange(L, device=DEVICE)
    pairs = SparseLatents(rows, rows, torch.ones(L, device=DEVICE), rows, rows + 1)
    error = 1000 * state.W_dec + 1e-3 * normal(L, D, seed=5)
    nothing = torch.zeros(L, device=DEVICE)
    gradient = SparseGradient(pairs, nothing, error, error, L)
    ours = body().row_update(gradient, state.W_dec).square()
    wanted = REFERENCE.row_update(exact_gradient(gradient), state.W_dec.double()).square()
    assert 1e-4 < wanted < 1e-2
    torch.testing.assert_close(ours.double(), wanted, rtol=0.2, atol=0)


@pytest.mark.parametrize("first_row", [0, (1 << 31) - 3])
def test_rounding_gives_the_bits_of_the_stock_one(first_row):
    source = normal(9, 72, seed=0)
    source[0, :4] = torch.tensor([float("inf"), -float("inf"), float("nan"), 3.3895e38])
    step = torch.tensor(123456.0, device=DEVICE)
    for array in (0, 1, 3, 4):
        expected, ours = (torch.empty_like(source, dtype=torch.bfloat16) for _ in range(2))
        round_stochastically_(expected, source, first_row, salt_of(step, array))
        rounding_kernel[(9,)](source, ours, step, first_row, 72, BD=128, ARRAY=array)
        torch.testing.assert_close(ours, expected, rtol=0, atol=0, equal_nan=True)
    assert (expected.float() != source.bfloat16().float())[1:].any()


def test_bfloat16_moments_have_the_bits_of_the_stock_ones():
    """Use numbers whose moments are exact in float32, so that only the rounding matters."""
    B, L, D = 6, 20, 40
    gradient = gradient_of(B, L, D, 1)
    integers = [
        torch.randint(-9, 10, t.shape, device=DEVICE).float()
        for t in (gradient.dvalues, gradient.x, gradient.error)
    ]
    rows = torch.arange(B, device=DEVICE)
    pairs = gradient.pairs._replace(values=torch.ones(B, device=DEVICE), latents=rows)
    gradient = SparseGradient(pairs, integers[0], integers[1], integers[2], B)
    state = state_of(L, D, torch.bfloat16)
    # A row of W_dec has one nonzero entry, so the projection is exact as well.
    state.W_dec.zero_()[:, 0] = 1.0
    adam = adam_of(beta1=0.75)._replace(beta2=0.5)
    theirs = clone(state)
    body().row_update(gradient, state.W_dec).apply(state, adam)
    StockKernels().row_update(gradient, theirs.W_dec).apply(theirs, adam)
    for kind in ("exp_avg", "exp_avg_sq"):
        for ours, wanted in zip(getattr(state, kind), getattr(theirs, kind), strict=True):
            assert torch.equal(ours, wanted)


def test_inputs_in_less_than_float32():
    gradient, state = gradient_of(9, 40, 72, 5), state_of(40, 72)
    reduced = gradient._replace(x=gradient.x.half(), error=gradient.error.half())
    square = body().row_update(reduced, state.W_dec).square().double()
    wanted = REFERENCE.row_update(exact_gradient(reduced), state.W_dec.double()).square()
    torch.testing.assert_close(square, wanted, rtol=1e-5, atol=0)


def test_no_pairs_and_no_latents():
    none = compact(-torch.ones(3, 2, device=DEVICE), torch.zeros(3, 2, device=DEVICE).long())
    x, state = normal(3, 40, seed=0), state_of(8, 40)
    gradient, theirs = SparseGradient(none, none.values, x, x, 3), clone(state)
    update = body().row_update(gradient, state.W_dec)
    assert update.square() == 0
    update.apply(state, adam_of())
    StockKernels().row_update(gradient, theirs.W_dec).apply(theirs, adam_of())
    for ours, wanted in zip(flat(state), flat(theirs), strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-6)
    empty = state_of(0, 40)
    update = body().row_update(gradient, empty.W_dec)
    assert update.square() == 0
    update.apply(empty, adam_of())


def test_inputs_past_two_to_the_31():
    far, rows = far_rows(40, 40, 3), torch.arange(40, device=DEVICE)
    pairs = SparseLatents(rows, rows % 3, torch.ones(40, device=DEVICE), rows, rows + 1)
    gradient, state = SparseGradient(pairs, pairs.values, far, far, 40), state_of(3, 40)
    square = body().row_update(gradient, state.W_dec).square().double()
    wanted = REFERENCE.row_update(exact_gradient(gradient), state.W_dec.double()).square()
    torch.testing.assert_close(square, wanted, rtol=1e-5, atol=0)


def test_rows_that_are_not_contiguous_are_refused():
    gradient, state = gradient_of(5, 30, 40, 3), state_of(30, 40)
    with pytest.raises(ShapeError, match=r"call .contiguous()"):
        body().row_update(gradient, state.W_dec.T.contiguous().T)


def in_slots_too(gradient: SparseGradient, n_slots: int) -> tuple[SparseGradient, torch.Tensor]:
    """Return the gradient with `n_slots` slots per row, and which of them hold its pairs."""
    pairs, R = gradient.pairs, len(gradient.x)
    counts = pairs.ends - pairs.offsets
    used = (torch.arange(n_slots, device=DEVICE) < counts[:, None]).reshape(-1)
    latents = torch.full((R * n_slots,), EMPTY, device=DEVICE)
    values, dvalues = torch.zeros(R * n_slots, device=DEVICE), normal(R * n_slots, seed=9)
    latents[used], values[used], dvalues[used] = pairs.latents, pairs.values, gradient.dvalues
    rows = torch.arange(R, device=DEVICE)
    offsets = rows * n_slots
    spread = SparseLatents(
        rows.repeat_interleave(n_slots), latents, values, offsets, offsets + counts
    )
    return gradient._replace(pairs=spread, dvalues=dvalues), used


@pytest.mark.parametrize("clipped", [False, True])
def test_pairs_in_slots_give_the_update_of_compact_ones(clipped):
    gradient, state = gradient_of(9, 40, 72, 5, hot=2), state_of(40, 72)
    spread, _ = in_slots_too(gradient, 7)
    theirs, adam = clone(state), adam_of(divisor=2.0 if clipped else None)
    results = []
    for own, kept in ((gradient, theirs), (spread, state)):
        update = body().row_update(own, kept.W_dec)
        results.append([update.input_bias_gradient(kept.W_enc), update.square()])
        results[-1].append(update.apply(kept, adam))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
    assert all(torch.equal(a, b) for a, b in zip(flat(state), flat(theirs), strict=True))


@pytest.mark.parametrize("weights", [torch.float32, COPIES], ids=str)
def test_the_gradient_of_the_input_bias_counts_the_main_path_of_every_replica(weights):
    B, L, D = 12, 300, 72  # two replicas, each with 4 rows of the main path and 2 others
    gradient = gradient_of(B, L, D, 5, hot=1)._replace(n_main=4, n_replicas=2)
    W = normal(L, D, seed=8).to(weights)
    ours = body().row_update(gradient, W.float()).input_bias_gradient(W)
    pairs = gradient.pairs
    main = torch.tensor([0, 1, 2, 3, 6, 7, 8, 9], device=DEVICE)
    live = torch.isin(pairs.rows, main)
    terms = gradient.dvalues.double()[:, None] * W.double()[pairs.latents]
    wanted = -terms[live].sum(0)
    torch.testing.assert_close(ours.double(), wanted, rtol=1e-5, atol=1e-5)
    if weights == torch.float32:
        theirs = StockKernels().row_update(gradient, W).input_bias_gradient(W)
        torch.testing.assert_close(theirs.double(), wanted, rtol=1e-5, atol=1e-5)


def test_apply_returns_the_squared_norm():
    gradient, state = gradient_of(9, 40, 72, 5, hot=2), state_of(40, 72)
    for kernels in (body(), StockKernels()):
        update = kernels.row_update(gradient, state.W_dec)
        wanted = kernels.row_update(gradient, state.W_dec).square()
        assert update.apply(clone(state), adam_of(skip=1.0)) == 0
        square = kernels.row_update(gradient, state.W_dec).apply(clone(state), adam_of())
        torch.testing.assert_close(square, wanted, rtol=1e-6, atol=0)


def test_rows_whose_gradient_is_not_finite_stay_unchanged():
    gradient, state = gradient_of(9, 40, 72, 5), state_of(40, 72, copies=COPIES)
    gradient.dvalues[0] = float("nan")
    hurt = int(gradient.pairs.latents[0])
    before = clone(state)
    square = body().row_update(gradient, state.W_dec).apply(state, adam_of())
    assert not square.isfinite()
    moved = [
        (a != b).reshape(40, -1).any(1) for a, b in zip(flat(state), flat(before), strict=True)
    ]
    # The gradient of the hurt latent's decoder row is finite, so that row moves.
    for part in (0, 2, 3, 5, 6, 8, 9):
        assert not moved[part][hurt] and moved[part].sum() == 39
    theirs = clone(before)
    assert not StockKernels().row_update(gradient, theirs.W_dec).apply(theirs, adam_of()).isfinite()
    assert all(torch.equal(a, b) for a, b in zip(flat(theirs), flat(before), strict=True))
