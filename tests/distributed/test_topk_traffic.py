"""Test that the global TopK sends the predicted bytes and selects the same as one rank."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sae_core.distributed import global_topk
from sae_core.distributed.mesh import row_range

pytestmark = pytest.mark.distributed

L, K = 1000, 8


def pre_acts(n_rows: int) -> torch.Tensor:
    """Return small integers [n_rows, L], which have many ties."""
    generator = torch.Generator().manual_seed(n_rows)
    return torch.randint(-50, 50, (n_rows, L), generator=generator).float()


@pytest.mark.parametrize("n_ranks", [2, 3, 4])
@pytest.mark.parametrize("n_rows", [1, 37])
def test_traffic_and_selection(n_ranks: int, n_rows: int, tmp_path: Path):
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.distributed.test_topk_traffic", str(n_rows)],
            env=os.environ
            | {
                "RANK": str(rank),
                "WORLD_SIZE": str(n_ranks),
                "OMP_NUM_THREADS": "1",
                "STORE": str(tmp_path / "store"),
            },
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(n_ranks)
    ]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert not any(process.returncode for process in processes)
    for rank, output in enumerate(outputs):
        assert int(output) == global_topk.sent_bytes(n_rows, K, n_ranks, rank)


def _rank(n_rows: int) -> None:
    import torch.distributed as dist

    rank, n_ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group(
        "gloo", init_method=f"file://{os.environ['STORE']}", rank=rank, world_size=n_ranks
    )
    sent = 0

    def all_to_all_single(out, tensor, out_sizes, sizes, group):
        nonlocal sent
        sent += (sum(sizes) - sizes[rank]) * tensor.element_size()
        return dist.all_to_all_single(out, tensor, out_sizes, sizes, group=group)

    def all_gather_into_tensor(out, tensor, group):
        nonlocal sent
        sent += tensor.numel() * tensor.element_size() * (n_ranks - 1)
        return dist.all_gather_into_tensor(out, tensor, group=group)

    global_topk.dist = SimpleNamespace(
        all_to_all_single=all_to_all_single,
        all_gather_into_tensor=all_gather_into_tensor,
        get_rank=dist.get_rank,
        get_world_size=dist.get_world_size,
    )
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


if __name__ == "__main__":
    _rank(int(sys.argv[1]))
