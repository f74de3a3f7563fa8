"""Test the parts of initialisation: sharded draws, geometric median, default auxk."""

from __future__ import annotations

import torch

from sae_core.architectures.dictionary_init import random_unit_rows
from sae_core.architectures.topk.settings import default_auxk
from sae_core.distributed.mesh import row_range
from sae_core.training.calibrate import geometric_median


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


def test_default_auxk():
    assert [default_auxk(d) for d in (1, 2, 576, 768, 4096)] == [1, 1, 256, 256, 2048]
