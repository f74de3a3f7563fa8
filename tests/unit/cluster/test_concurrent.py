"""Test how far a harvest may run ahead of a concurrent trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from activation_store import Consumer, HarvestLock, StoreWriter
from cluster.concurrent import _Cancelled, _Harvest, _has_rows
from cluster.harvest.stage import HarvestJob
from conf.checks import validate
from conf.schema.run import RunConfig
from foundation.errors import ConfigError

ROWS = 64


def harvest_of(path: Path, items: list[int], lead: int, sample_tokens: int) -> _Harvest:
    writer = StoreWriter(path, {"acts": 4}, "float32", ROWS)
    for item in items:
        writer.write_item(item, np.ones((ROWS, 4), np.float32))
    config = RunConfig()
    config.cluster.mode, config.cluster.max_lead_items = "concurrent", lead
    config.store.path, config.store.window_items = str(path), 2
    config.train.sample_tokens = sample_tokens
    plan: Any = None
    harvest_lock = HarvestLock(path, "run")
    return _Harvest(
        HarvestJob(
            config, path.parent, str(path), plan, {}, None, harvest_lock, True, Console(), False
        )
    )


def test_a_missing_item_may_always_start(tmp_path):
    done = [item for item in range(30) if item != 9]
    harvest = harvest_of(tmp_path / "store", done, lead=5, sample_tokens=64)
    consumer = Consumer(tmp_path / "store", "run")
    consumer.publish(next_item=8, keep_from_item=0, position=0)
    assert harvest._may_start(9)  # the trainer needs it next, whatever follows
    assert harvest._may_start(12) and not harvest._may_start(13)


def test_the_sample_comes_first_and_then_the_lead(tmp_path):
    harvest = harvest_of(tmp_path / "store", [0, 1, 2], lead=4, sample_tokens=3 * ROWS)
    assert harvest._may_start(99)  # the sample needs three items; complete windows have two
    StoreWriter(tmp_path / "store").write_item(3, np.ones((ROWS, 4), np.float32))
    assert not harvest._may_start(4) and harvest._may_start(3)


def test_a_cancelled_harvest_ends_with_nothing_left_to_start(tmp_path):
    harvest = harvest_of(tmp_path / "store", [0], lead=4, sample_tokens=1)
    assert harvest._may_start(None)
    harvest._cancelled.set()
    with pytest.raises(_Cancelled):
        harvest._may_start(None)


def config_with(lead: int, batch_tokens: int) -> RunConfig:
    config = RunConfig(stage="harvest")
    config.model.path, config.model.hookpoints, config.data.path = "m", ["h"], "t"
    config.store.path, config.store.shard_tokens, config.store.window_items = "s", 127, 1
    config.cluster.mode, config.cluster.max_lead_items = "concurrent", lead
    config.train.batch_tokens = batch_tokens
    return config


def test_a_lead_that_cannot_hold_a_batch_is_refused():
    validate(config_with(9, 127 * 8), ("harvest",))
    with pytest.raises(ConfigError, match="at least 9"):
        validate(config_with(8, 127 * 8), ("harvest",))


def test_a_store_that_is_still_being_built_has_no_rows_yet(tmp_path):
    path = tmp_path / "store"
    assert not _has_rows(str(path))
    StoreWriter(path, {"acts": 4}, "float32", ROWS).write_item(0, np.ones((ROWS, 4), np.float32))
    assert _has_rows(str(path))
    # An object store may show this state, because the group's metadata is written first.
    (path / "position" / "zarr.json").unlink()
    assert not _has_rows(str(path))
