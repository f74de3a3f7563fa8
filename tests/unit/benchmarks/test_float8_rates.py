"""Test the measurement of certified rows on small cases."""

from __future__ import annotations

import pytest
import torch

from benchmarks.float8_rates import BOUNDS, PER_K, Case, measure, normal, planted


@pytest.mark.parametrize(
    "case", [Case("gaussian", normal(0, 8, 96), 2000, 8), planted(8, 2000, 96, 8)]
)
def test_a_small_case(case: Case) -> None:
    row = measure(case)
    assert row["work"] == {"L": 2000, "D": 96, "B": 8, "k": 8} and row["candidates"] == 48
    assert row["wrong"] == 0 and 0 < row["most_error"] < 1
    assert 0 <= row["second_round"] <= 4
    shares = row["certified_by"]
    assert set(shares) == set(BOUNDS)
    for of_bound in shares.values():
        assert list(of_bound) == [str(per_k) for per_k in PER_K]
        assert list(of_bound.values()) == sorted(of_bound.values())
    assert all(shares["strict"][n] <= shares["shipped"][n] for n in shares["strict"])


def test_a_dictionary_is_measured_with_its_bias() -> None:
    bias = torch.zeros(2000)
    bias[::300] = 100.0  # seven latents that no other can replace
    row = measure(Case("biased", normal(0, 8, 96), 2000, 4, normal(1, 2000, 96), bias))
    assert row["certified"] == 1 and row["wrong"] == 0
