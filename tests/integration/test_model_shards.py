"""Test a language model split over two processes: same rows as with one, even after a kill."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from activation_store import open_store, verify_store
from activation_store.errors import StoreMismatchError
from cluster.harvest import stage as harvest_stage
from cluster.language_model.errors import ModelError
from cluster.ray_session import ray_session
from conf.schema.cluster import ClusterConfig
from conf.schema.data import DataConfig
from conf.schema.model import ModelConfig
from conf.schema.run import RunConfig
from foundation.errors import ConfigError
from tests.support.tiny_models import save_gpt2, save_llama, write_text

HOOKPOINTS = ["model.layers.2", "model.layers.0.mlp", "model.layers.1.self_attn"]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("shards")
    save_llama(work / "llama", kv_heads=2)
    save_llama(work / "one-kv-head")
    save_gpt2(work / "gpt2")
    write_text(work / "text.txt")
    return work


@pytest.fixture(scope="module")
def _ray() -> Iterator[None]:
    with ray_session(ClusterConfig(), min_cpus=2):
        yield


def make_config(work: Path, shards: int, model: str = "llama") -> RunConfig:
    """Make the config of a run with 20 items of about 60 rows."""
    config = RunConfig(
        cache_dir=str(work / "cache"),
        model=ModelConfig(
            path=str(work / model),
            dtype="float32",
            hookpoints=list(HOOKPOINTS),
            batch_contexts=3,
            shards=shards,
        ),
        data=DataConfig(
            path=str(work / "text.txt"), tokens=1200, context_tokens=16, heldout_fraction=0.2
        ),
    )
    config.store.shard_tokens, config.store.dtype = 64, "float32"
    config.cluster.harvest_workers = 1
    return config


def members() -> list[int]:
    """Return the process ids of all ranks but rank 0."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            line = (folder / "cmdline").read_bytes()
        except OSError:
            continue  # ended in the meantime
        if b"cluster.language_model.tensor_parallel" in line:
            found.append(int(folder.name))
    return found


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("_ray")
def test_two_ranks_store_the_rows_of_one_even_if_one_is_killed(work: Path) -> None:
    harvest_stage.run(make_config(work, shards=1), work / "one")
    harvest_stage.run(make_config(work, shards=2), work / "two")
    killed: list[int] = []
    before = set(members())

    def kill_a_member() -> None:
        while len(list((work / "struck" / "store" / "_log").glob("*/*.json"))) < 3:
            time.sleep(0.002)
        killed.extend(set(members()) - before)
        for process in killed:
            os.kill(process, signal.SIGKILL)

    killer = threading.Thread(target=kill_a_member, daemon=True)
    killer.start()
    harvest_stage.run(make_config(work, shards=2), work / "struck")
    killer.join(timeout=1)
    assert len(killed) == 1
    assert verify_store(work / "struck" / "store") == []
    one, two, struck = (open_store(work / name / "store") for name in ("one", "two", "struck"))
    assert one.n_tokens == two.n_tokens == struck.n_tokens
    for name in HOOKPOINTS:
        rows = [store.read(name, 0, one.n_tokens) for store in (one, two, struck)]
        assert rows[0].any()
        np.testing.assert_allclose(rows[1], rows[0], rtol=0, atol=1e-5)
        assert (rows[1] != rows[0]).any()  # proves that the sums were split
        np.testing.assert_array_equal(rows[1], rows[2])
    with pytest.raises(StoreMismatchError, match="model_shards: the store has 2"):
        config = make_config(work, shards=1)
        config.store.path = str(work / "two" / "store")
        harvest_stage.run(config, work / "other")


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("_ray")
def test_a_hookpoint_that_is_split_over_ranks_is_refused(work: Path) -> None:
    config = make_config(work, shards=2)
    config.model.hookpoints = ["model.layers.0.mlp.act_fn"]
    expected = r"has only a part of the output of 'model.layers.0.mlp.act_fn'"
    with pytest.raises(ModelError, match=expected):
        harvest_stage.run(config, work / "part")


@pytest.mark.parametrize(
    ("model", "shards", "expected"),
    [
        ("gpt2", 2, "no tensor-parallel plan for gpt2"),
        ("one-kv-head", 2, "num_key_value_heads=1"),
        ("llama", 3, "num_attention_heads=2"),
    ],
)
def test_models_that_cannot_be_split(work: Path, model: str, shards: int, expected: str) -> None:
    with pytest.raises(ConfigError, match=f"model.shards={shards}: .*{expected}"):
        harvest_stage.run(make_config(work, shards, model), work / "refused")
