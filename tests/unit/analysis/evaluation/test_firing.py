"""Test the sample of stored rows on which firings are counted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from activation_store import Store, StoreWriter, open_store
from analysis.evaluation import firing
from analysis.evaluation.firing import count_firings, sample_rows
from analysis.evaluation.measurement import Accumulator, Rows
from sae_core.architectures.topk.inference import TopKInference
from sae_core.config import TopKConfig
from sae_core.inference_memory import ShardPlan
from sae_core.kernels import get_kernels
from sae_core.sharded_inference import ShardedSAE

D, L, ROWS = 6, 12, 500


@pytest.fixture
def store(tmp_path: Path) -> Store:
    rows = np.random.default_rng(0).normal(size=(ROWS, D)).astype(np.float32)
    writer = StoreWriter(tmp_path / "store", {"x": D}, dtype="float32", shard_tokens=100)
    for item in range(5):
        writer.write_item(item, {"x": rows[item * 100 : item * 100 + 100]})
    writer.finalise()
    return open_store(tmp_path / "store")


@pytest.fixture(autouse=True)
def _short_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(firing, "ROWS_PER_READ", 32)


def sharded(rows_at_once: int) -> tuple[TopKInference, ShardedSAE]:
    W = torch.cat([torch.eye(D), -torch.eye(D)])
    sae = TopKInference(TopKConfig(n_latents=L, k=2), W, W, torch.zeros(L), torch.zeros(D))
    plan = ShardPlan((torch.device("cpu"),), 5, False, 8, rows_at_once)
    return sae, ShardedSAE(sae.stored(), plan, get_kernels("stock", torch.float32))


def test_all_rows_if_there_are_no_more(store: Store) -> None:
    for wanted in (None, ROWS, 10**9):
        sample = sample_rows(store, wanted, seed=0)
        assert (sample.n_rows, sample.of_rows) == (ROWS, ROWS)
        assert sample.blocks[0] == (0, 32) and sample.blocks[-1] == (480, 500)
        assert sample == sample_rows(store, wanted, seed=1)


def test_a_sample_is_random_rounded_up_and_fixed_by_the_seed(store: Store) -> None:
    sample = sample_rows(store, 65, seed=0)
    assert len(sample.blocks) == 3 and sample.blocks == sorted(set(sample.blocks))
    assert sample.n_rows == sum(stop - start for start, stop in sample.blocks) <= 96
    assert sample.of_rows == ROWS and sample == sample_rows(store, 65, seed=0)
    samples = [sample_rows(store, 65, seed).blocks for seed in range(200)]
    assert len({tuple(blocks) for blocks in samples}) > 50
    drawn = np.bincount([start // 32 for blocks in samples for start, _ in blocks], minlength=16)
    assert drawn.min() > 10 and drawn.sum() == 600


@pytest.mark.parametrize("rows_at_once", [20, 32, 70, 10_000])
@pytest.mark.parametrize("wanted", [None, 100])
def test_counts_are_those_of_the_sample(
    store: Store, wanted: int | None, rows_at_once: int
) -> None:
    sae, shards = sharded(rows_at_once)
    sample = sample_rows(store, wanted, seed=3)
    x = torch.cat([torch.from_numpy(store.read("x", *block)) for block in sample.blocks])

    class Seen(Accumulator):
        def __init__(self) -> None:
            self.x: list[torch.Tensor] = []
            self.recon: list[torch.Tensor] = []

        def add_rows(self, rows: Rows) -> None:
            self.x.append(rows.x)
            self.recon.append(rows.recon)

    seen = Seen()
    shown: list[int] = []
    result = count_firings(shards, store, "x", sample, [seen], shown.append)
    assert result.n_rows == sample.n_rows == len(x) == shown[-1]
    assert torch.equal(result.counts, (sae.encode(x) > 0).sum(0))
    torch.testing.assert_close(result.mean, x.double().mean(0))
    assert torch.equal(torch.cat(seen.x), x)
    torch.testing.assert_close(torch.cat(seen.recon), sae(x))
    # The SAE is read once per group of rows, twice as reconstructions are wanted.
    groups = shards.read_bytes / (2 * 4 * L * D)
    assert groups == len(shown) >= len(x) / rows_at_once
    if rows_at_once >= ROWS:
        assert groups == 1
