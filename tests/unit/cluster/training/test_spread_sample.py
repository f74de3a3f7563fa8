"""Test that calibration samples cover ordered stores, and that their order is reported."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from activation_store import Store, StoreWriter, open_store
from cluster.training.batch_order import BatchOrder
from cluster.training.mixture_source import MixtureSource
from cluster.training.spread_sample import order_warning, spread_blocks, variance_between
from cluster.training.store_checks import warn_about_rows
from cluster.training.store_source import StoreSource
from conf.schema.run import RunConfig

D, ITEMS, ROWS = 8, 16, 1024
ORDER = BatchOrder(seed=0, batch_tokens=256, window_items=2, buffer_tokens=512)


def write_store(path: Path, scales: list[float], provenance: dict[str, Any] | None = None) -> Store:
    """Write items of normal rows, each item with its own scale and mean."""
    rng = np.random.default_rng(0)
    options: dict[str, Any] = {"dtype": "float32", "shard_tokens": ROWS, "n_items": ITEMS}
    writer = StoreWriter(path, {"a": D}, provenance=provenance or {}, **options)
    for item, scale in enumerate(scales):
        rows = scale * (1 + rng.normal(size=(ROWS, D)))
        writer.write_item(item, rows.astype(np.float32))
    writer.finalise()
    return open_store(path)


def power(x: torch.Tensor) -> float:
    return float(x.double().square().mean())


def test_blocks_are_spread_evenly() -> None:
    assert spread_blocks(100, 1000) == [(0, 100)]
    blocks = spread_blocks(16384, 2048)
    assert len(blocks) == 8 and blocks[0] == (0, 256) and blocks[-1] == (16128, 16384)
    assert {stop - start for start, stop in blocks} == {256}
    assert spread_blocks(7, 1) == [(0, 1)]


def test_the_sample_covers_both_sources_of_an_ordered_store(tmp_path: Path) -> None:
    store = write_store(tmp_path / "s", [1.0] * 8 + [12.0] * 8)
    source = StoreSource(store, "a", ORDER)
    everything = power(torch.from_numpy(store.read("a", 0, store.n_tokens)))
    sample = source.sample(4096)
    assert sample.shape == (4096, D) and abs(power(sample) / everything - 1) < 0.05
    # The encoder is calibrated with the first rows of the sample: they are mixed, too.
    assert abs(power(sample[:1024]) / everything - 1) < 0.2
    assert torch.equal(sample, StoreSource(store, "a", ORDER).sample(4096))
    assert len(source.sample(10**6)) == ITEMS * ROWS
    source.close()
    small = write_store(tmp_path / "small", [3.0] * 16)
    mixture = MixtureSource([store, small], [3.0, 1.0], "a", ORDER)
    expected = (3 * everything + power(torch.from_numpy(small.read("a", 0, 16384)))) / 4
    assert abs(power(mixture.sample(4096)) / expected - 1) < 0.05
    mixture.close()


def test_a_harvested_store_gives_the_first_rows_of_its_order(tmp_path: Path) -> None:
    """A concurrent run, which calibrates while the store grows, then calibrates like this one."""
    store = write_store(tmp_path / "s", [1.0] * 16, {"tokens_wanted": 16384})
    other = write_store(tmp_path / "o", [2.0] * 16, {"tokens_wanted": 16384})
    # Batches as large as the sample, because the order within the buffer depends on their size.
    order = replace(ORDER, batch_tokens=1024)
    for source in (
        StoreSource(store, "a", order),
        MixtureSource([store, other], [1.0, 1.0], "a", order),
    ):
        assert torch.equal(source.sample(1024), source.next().x)
        source.close()


def test_an_ordered_store_is_told(tmp_path: Path) -> None:
    ordered = write_store(tmp_path / "ordered", [1.0] * 8 + [12.0] * 8)
    mixed = write_store(tmp_path / "mixed", [1.0, 12.0] * 8)
    warning = order_warning(ordered, "a", 16384)
    assert warning is not None and "of the variance of a lies between sixteenths" in warning
    assert order_warning(write_store(tmp_path / "even", [1.0] * 16), "a", 16384) is None
    harvested = write_store(tmp_path / "harvested", [1.0] * 8 + [12.0] * 8, {"tokens_wanted": 1})
    assert order_warning(harvested, "a", 16384) is None
    assert variance_between([np.ones((2, 3))] * 16) == 0.0  # constant rows
    config = RunConfig()
    config.store.path, config.train.batch_tokens = str(ordered.path), 256
    console = Console(record=True, width=500)
    warn_about_rows(config, console)
    assert "its rows are ordered" in console.export_text()
    assert order_warning(mixed, "a", 2048) is None  # too few blocks to tell
