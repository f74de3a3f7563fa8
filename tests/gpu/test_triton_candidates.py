"""Cases for all candidates of the encoder, run by Triton's interpreter or on a GPU.

The interpreter cannot run inline PTX, so `tests.support.kernels.ptx` runs the same text on the CPU.
It gets smaller tiles, because its time depends on the elements of whole tiles.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from sae_core.kernels.keys import pool_width
from sae_core.kernels.triton.encoder import encode
from sae_core.kernels.triton.encoder.candidates import (
    Candidate,
    TileConfig,
    Tiles,
    candidates,
    descriptors_fit,
    tiles,
)
from sae_core.kernels.triton.encoder.choose import FilterTimer
from sae_core.kernels.triton.encoder.encode import Encoder, Factors, Pools, plain_rows
from sae_core.kernels.triton.prefilter_float8 import SplitRows
from sae_core.kernels.triton.quantise import FP8
from tests.gpu.test_triton_encode import DEVICE, INF, INTERPRETED, NAN, REFERENCE, integers
from tests.gpu.test_triton_float8 import both, unbounded
from tests.support.kernels import ptx

pytestmark = pytest.mark.gpu

KINDS = [(torch.float32, "ieee"), (torch.float16, "ieee"), (FP8, "ieee")]
# The interpreter cannot multiply bfloat16 and ignores tf32; both have the candidates of float16.
KINDS += [] if INTERPRETED else [(torch.float32, "tf32"), (torch.bfloat16, "ieee")]
ALL = [
    pytest.param(
        dtype, precision, each, id=f"{dtype} {precision} {each.label}".removeprefix("torch.")
    )
    for dtype, precision in KINDS
    for each in candidates(dtype, precision)
]
every_candidate = pytest.mark.parametrize(("dtype", "precision", "candidate"), ALL)


@pytest.fixture(autouse=True)
def inline_ptx(monkeypatch):
    if INTERPRETED:
        builder = "triton.runtime.interpreter.InterpreterBuilder.create_inline_asm"
        monkeypatch.setattr(builder, ptx.create_inline_asm)


def encoder(dtype: torch.dtype, precision: str, candidate: Candidate) -> Encoder:
    used = Tiles(candidate, tiles(dtype, precision).many)
    if INTERPRETED:
        used = Tiles(*(replace(each, tile=quarter(each.tile)) for each in (used.few, used.many)))
    return Encoder(dtype, precision, used, INTERPRETED)


def quarter(tile: TileConfig) -> TileConfig:
    return replace(tile, BM=tile.BM // 4, BN=tile.BN // 4, GROUP=2)


def rows_of(dtype: torch.dtype, *matrices: torch.Tensor) -> tuple[SplitRows, ...]:
    """Return x and W in the format that the encoder multiplies."""
    if dtype == FP8:
        return tuple(unbounded(part) for part in both(*matrices))
    return tuple(plain_rows(matrix.to(dtype)) for matrix in matrices)


def assert_same_selection(dtype, precision, candidate, x, W, b, k):
    x_rows, W_rows = rows_of(dtype, x, W)
    values, latents = encoder(dtype, precision, candidate).topk_split(x_rows, W_rows, b, k)
    expected, expected_latents = REFERENCE.encode_topk(x.double(), W.double(), b.double(), k)
    assert torch.equal(latents, expected_latents)
    torch.testing.assert_close(values.double(), expected, rtol=0, atol=0, equal_nan=True)


@every_candidate
def test_every_candidate_selects_the_same(dtype, precision, candidate):
    # Ragged in both directions, ties throughout, and a last segment with few keys per tile.
    x, W, b = integers((37, 72), 1), integers((700, 72), 2), integers((700,), 3)
    x[5], W[600] = 0.0, 0.0
    b[[3, 640]], b[[500, 699]], b[698], b[650] = 50.0, INF, -INF, NAN
    assert_same_selection(dtype, precision, candidate, x, W, b, 4)


@every_candidate
def test_every_candidate_runs_rows_again_that_overflow(dtype, precision, candidate):
    x, W = torch.zeros(3, 40, device=DEVICE), torch.zeros(400, 40, device=DEVICE)
    x[:, 0] = torch.tensor([1.0, -1.0, 2.0], device=DEVICE)
    # Exact in bfloat16, which holds the largest channel of float8 rows; float16 has a short range.
    small = (torch.arange(400, dtype=torch.int16) + 0x3F80).view(torch.bfloat16).float()
    W[:, 0] = (small if dtype == FP8 else torch.arange(400.0)).to(DEVICE)
    assert_same_selection(dtype, precision, candidate, x, W, torch.zeros(400, device=DEVICE), 2)


@every_candidate
def test_nothing_is_appended_outside_the_matrix(dtype, precision, candidate):
    """NaN passes every limit, and elements outside the matrix are copies or zeros."""
    B, L, k, first = 5, 170, 3, 100
    x, W = integers((B, 72), 1), integers((L, 72), 2)
    if dtype != FP8:  # the interpreter turns a float8 NaN into a number
        x[0], W[0] = NAN, NAN
    b = torch.full((L,), NAN, device=DEVICE)
    counts = torch.full((B + 128,), 7, dtype=torch.int32, device=DEVICE)
    counts[:B] = 0
    pool = torch.full((B + 128, pool_width(k)), -7, device=DEVICE)
    limit = torch.full((B,), INF, device=DEVICE)
    x_rows, W_rows = rows_of(dtype, x, W)
    used = encoder(dtype, precision, candidate)
    pools = Pools(pool[:B], counts[:B], limit, torch.zeros_like(counts[:B]))
    used.filter(used.tiles.few, Factors(x_rows, W_rows, b, None, None), first, L, pools)
    n = L - first
    assert (counts[:B] == n).all() and (counts[B:] == 7).all()
    latents = 0x7FFFFFFF - (pool[:B, :n] & 0x7FFFFFFF)
    assert torch.equal(latents.sort(1).values, torch.arange(first, L).expand(B, n).to(DEVICE))
    assert (pool[:B, n:] == -7).all() and (pool[B:] == -7).all()


def test_loads_fall_back_to_pointers_where_descriptors_do_not_fit(monkeypatch):
    candidate = next(each for each in candidates(torch.float16, "ieee") if each.descriptors)
    # The matrices begin at an odd column; rows of lengths other than 48 may be copied.
    x, W, b = integers((20, 64), 1).half(), integers((600, 64), 2).half(), integers((600,), 3)
    x, W = x[:, 1:49], W[:, 1:49]
    assert not descriptors_fit(W) and descriptors_fit(integers((4, 40), 1).half())
    assert not descriptors_fit(integers((4, 48), 1).half()[:, 1:41])
    assert_same_selection(torch.float16, "ieee", candidate, x, W, b, 2)
    # The check is what avoids descriptors: without it, making one fails.
    monkeypatch.setattr(encode, "descriptors_fit", lambda *matrices: True)
    with pytest.raises(AssertionError, match="aligned"):
        assert_same_selection(torch.float16, "ieee", candidate, x, W, b, 2)


@every_candidate
def test_a_timed_launch_appends_as_many_keys_as_in_a_last_segment(dtype, precision, candidate):
    n_rows, n_latents, k = 33, 1200, 5
    used = encoder(dtype, precision, candidate)
    timer = FilterTimer(used, n_rows, n_latents, 72, k, DEVICE)
    timer.launch(used.tiles.few)
    # Each of the 900 latents passes with a probability of k / 300: 15 keys per row.
    assert 13 < timer.counts.float().mean() < 17
    if not INTERPRETED:
        assert timer(used.tiles.few) > 0
