"""Test that the global TopK sends the predicted bytes and selects the same as one rank."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sae_core.distributed import global_topk
from sae_core.distributed.mesh import row_range
from tests.support.ranks import Ranks

pytestmark = pytest.mark.distributed

L, K = 1000, 8


def pre_acts(n_rows: int) -> torch.Tensor:
    """Return small integers [n_rows, L], which have many ties."""
    generator = torch.Generator().manual_seed(n_rows)
    return torch.randint(-50, 50, (n_rows, L), generator=generator).float()


@pytest.mark.parametrize("n_ranks", [2, 3, 4])
@pytest.mark.parametrize("n_rows", [1, 37])
def test_traffic_and_selection(n_ranks: int, n_rows: int, tmp_path: Path):
    ranks = Ranks(tmp_path, n_ranks, _select, n_rows)
    assert ranks.codes() == [0] * n_ranks, ranks.logs()
    for rank, log in enumerate(ranks.logs()):
        assert int(log.splitlines()[-1]) == global_topk.sent_bytes(n_rows, K, n_ranks, rank)


def _select(n_rows: int) -> int:
    import torch.distributed as dist

    dist.init_process_group("gloo")
    rank, n_ranks = dist.get_rank(), dist.get_world_size()
    sent = 0

    def all_to_all_single(out, tensor, out_sizes, sizes, group):
        nonlocal sent
        sent += (sum(sizes) - sizes[rank]) * tensor.element_size()
        return dist.all_to_all_single(out, tensor, out_sizes, sizes, group=group)

    def all_gather_into_tensor(out, tensor, group):
        nonlocal sent
        sent += tensor.numel() * tensor.element_size() * (n_ranks - 1)
        return dist.all_gather_into_tensor(out, tensor, group=group)

    counted = SimpleNamespace(
        all_to_all_single=all_to_all_single,
        all_gather_into_tensor=all_gather_into_tensor,
        get_rank=dist.get_rank,
        get_world_size=dist.get_world_size,
    )
    vars(global_topk)["dist"] = counted
    whole = pre_acts(n_rows)
    start, stop = row_range(L, rank, n_ranks)
    values, latents = whole[:, start:stop].sort(dim=1, descending=True, stable=True)
    chosen = global_topk.select_global(values[:, :K], latents[:, :K], K, start, dist.group.WORLD)
    mine = [
        set((row[keep] + start).tolist()) for row, keep in zip(latents[:, :K], chosen, strict=True)
    ]
    best = whole.sort(dim=1, descending=True, stable=True).indices[:, :K].tolist()
    assert mine == [{i for i in row if start <= i < stop} for row in best]
    dist.destroy_process_group()
    print(sent)
    return 0
