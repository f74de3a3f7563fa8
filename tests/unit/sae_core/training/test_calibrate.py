"""Test the parts of initialisation: sharded draws, geometric median, default auxk."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sae_core.architectures.dictionary_init import random_unit_rows
from sae_core.architectures.topk.settings import default_auxk
from sae_core.distributed.mesh import row_range
from sae_core.errors import ShapeError
from sae_core.training.calibrate import calibrate, geometric_median


def test_rows_do_not_depend_on_the_sharding():
    whole = random_unit_rows(0, 3000, 8, seed=5)
    for n in (2, 3, 7):
        parts = [random_unit_rows(*row_range(3000, shard, n), 8, seed=5) for shard in range(n)]
        assert torch.equal(torch.cat(parts), whole)
    assert not torch.equal(random_unit_rows(0, 10, 8, seed=6), whole[:10])
    torch.testing.assert_close(whole.norm(dim=1), torch.ones(3000))


def test_row_ranges_are_those_of_chunk():
    for n, shards in ((10, 4), (4096, 3), (7, 7), (5, 2)):
        sizes = [stop - start for start, stop in (row_range(n, s, shards) for s in range(shards))]
        assert sizes[: len(torch.arange(n).chunk(shards))] == [
            len(part) for part in torch.arange(n).chunk(shards)
        ]


def test_geometric_median_resists_an_outlier():
    x = torch.randn(501, 4, generator=torch.Generator().manual_seed(0))
    x[0] = 1e6
    assert geometric_median(x).norm() < 0.3 < x.mean(0).norm()


@pytest.mark.parametrize("value", [1000.0, 1.0, 1e-6, 0.0])
def test_equal_rows_are_refused_even_if_they_are_rounded(value):
    """Training on the rounding noise of constant rows would look like training."""
    sae: Any = SimpleNamespace(d_model=8)
    noise = 1e-6 * value * torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    for rows in (torch.full((64, 8), value), value + noise):
        with pytest.raises(ShapeError, match=r"variance .*: expected a finite number above"):
            calibrate(sae, rows)
    with pytest.raises(AttributeError):  # the checks pass; a real SAE would be calibrated now
        calibrate(sae, value + 1e-3 * max(value, 1.0) * torch.randn(64, 8))


def test_default_auxk():
    assert [default_auxk(d) for d in (1, 2, 576, 768, 4096)] == [1, 1, 256, 256, 2048]
