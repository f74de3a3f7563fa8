"""Test the inline PTX of the encoder's epilogue, run by an emulator from the text itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sae_core.kernels.keys import pack_keys
from tests.support.kernels import ptx

pytest.importorskip("triton", reason="triton is not installed: pip install triton")

from sae_core.kernels.triton.encoder.epilogue import INLINE, PACK

INF, NAN = float("inf"), float("nan")
FIRST = 1 << 30


def append(values: torch.Tensor, limits: torch.Tensor, width: int, rows: int, latents: int):
    """Run the epilogue for a tile [rows + 1, latents + 1], which is larger than the matrix.

    Returns:
        counts [rows + 1] and the pool [rows + 1, width] with its rows sorted, because the
        order of slots is arbitrary; -7 where no key was written.
    """
    counts = torch.zeros(rows + 1, dtype=torch.int32)
    pool = torch.full((rows + 1, width), -7)
    row, column = np.indices(tuple(values.shape), dtype=np.int32)
    row, column = np.where(row < rows, row, -1).astype(np.int32), column + np.int32(FIRST)
    numbers = (FIRST + latents, width)
    operands = [values.numpy(), np.broadcast_to(limits.numpy()[:, None], values.shape), row, column]
    operands += [np.full(values.shape, part.data_ptr(), np.int64) for part in (counts, pool)]
    operands += [np.full(values.shape, number, np.int32) for number in numbers]
    # Values outside the matrix complete the last group.
    flat = [np.append(part, np.repeat(part[-1:, -1], -part.size % PACK.value)) for part in operands]
    ptx.run(INLINE.value, flat, PACK.value)
    return counts, pool.sort().values


def any_floats(n: int, seed: int) -> torch.Tensor:
    bits = torch.randint(-(1 << 31), 1 << 31, (n,), generator=torch.Generator().manual_seed(seed))
    special = torch.tensor([0.0, -0.0, NAN, -NAN, INF, -INF, 1e-45, -1e-45, 1.0, -1.0])
    quiet = torch.tensor([0x7F800001, -1, 0x7FC00000 - (1 << 31)], dtype=torch.int32)  # more NaNs
    return torch.cat((special, quiet.view(torch.float32), bits.int().view(torch.float32)))


def test_keys_equal_those_of_pack_keys_bit_for_bit():
    values = any_floats(500, 0)
    n = len(values)
    tile = torch.full((2, n + 1), NAN)
    tile[0, :n] = values
    # A NaN as limit lets every value pass; the encoder never sets one.
    counts, pool = append(tile, torch.tensor([NAN, -INF]), n, 1, n)
    assert counts.tolist() == [n, 0]
    assert torch.equal(pool[0], pack_keys(values, FIRST + torch.arange(n)).sort().values)
    assert (pool[1] == -7).all()


@pytest.mark.parametrize("limit", [-INF, -1.0, -0.0, 0.0, 1e-45, INF])
def test_appends_values_not_at_most_the_limit(limit):
    values = any_floats(300, 1)
    n = len(values)
    above = ~(values <= limit)
    counts, pool = append(values.expand(3, n).contiguous(), torch.full((3,), limit), n, 2, n)
    wanted = torch.full((n,), -7)
    wanted[: above.sum()] = pack_keys(values[above], FIRST + torch.arange(n)[above])
    assert counts.tolist() == [above.sum(), above.sum(), 0]
    assert all(torch.equal(row, wanted.sort().values) for row in pool[:2])


def test_a_full_pool_counts_the_keys_that_it_loses():
    counts, pool = append(torch.ones(2, 20), torch.zeros(2), 8, 1, 19)
    assert counts.tolist() == [19, 0]
    # Which keys are lost depends on the order in which lanes take slots.
    assert pool[0].unique().numel() == 8
    assert torch.isin(pool[0], pack_keys(torch.ones(19), FIRST + torch.arange(19))).all()
    assert (pool[1] == -7).all()


@pytest.mark.parametrize("hits", [(i,) for i in range(PACK.value)] + [(0, PACK.value - 1)])
@pytest.mark.parametrize("value", [2.0, NAN])
def test_any_value_of_a_group_is_found_alone(hits, value):
    """Other groups would take the group's branch along, so there is only one."""
    n = PACK.value - 1
    tile = torch.ones(1, PACK.value)
    tile[0, list(hits)] = value
    inside = [i for i in hits if i < n]
    for latents, wanted in ((n, inside), (n + 1, list(hits))):
        counts, pool = append(tile, torch.ones(1), 4, 1, latents)
        assert counts.tolist() == [len(wanted), 0]
        expected = torch.full((4,), -7)
        where = torch.tensor(wanted, dtype=torch.int64)
        expected[: len(wanted)] = pack_keys(tile[0, where], FIRST + where)
        assert torch.equal(pool[0], expected.sort().values)


def test_a_group_without_hits_runs_only_the_comparisons(monkeypatch):
    steps: list[str] = []
    run_step = ptx._step

    def step(line, *state):
        steps.append(line)
        return run_step(line, *state)

    monkeypatch.setattr(ptx, "_step", step)
    append(torch.ones(1, PACK.value), torch.ones(1), 4, 1, PACK.value)
    # PACK comparisons, a vote, a branch, and unused results.
    assert len(steps) == PACK.value + 2 + PACK.value


def test_an_unknown_instruction_is_refused():
    with pytest.raises(NotImplementedError, match=r"ex2\.approx\.f32"):
        ptx.run("{ex2.approx.f32 $0, $1;\n}", [np.zeros(1, np.float32)], 1)
