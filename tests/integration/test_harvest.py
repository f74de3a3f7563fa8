"""Test harvests of tiny models: correct rows, and the same bytes after kills and restarts."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from activation_store import StoreWriter, open_store, verify_store
from activation_store.errors import StoreBusyError, StoreMismatchError
from cluster.errors import ClusterError, PlacementError
from cluster.harvest import stage as harvest_stage
from cluster.harvest import worker_pool
from cluster.harvest.items import plan_items
from cluster.harvest.worker import ItemResult
from cluster.language_model.errors import ModelError, TextError
from cluster.language_model.loading import load_language_model, load_tokenizer
from cluster.language_model.tokens.contexts import prepare_contexts
from cluster.ray_session import ray_session
from conf.schema.cluster import ClusterConfig
from conf.schema.data import DataConfig
from conf.schema.model import ModelConfig
from conf.schema.run import RunConfig
from tests.support.tiny_models import save_gpt2, save_llama, write_text

pytestmark = pytest.mark.ray
CONTEXT, SHARD = 16, 64


@pytest.fixture(scope="module", autouse=True)
def _ray() -> Iterator[None]:
    with ray_session(ClusterConfig(), min_cpus=3):
        yield


def make_config(tmp_path: Path, architecture: str = "llama", **data: Any) -> RunConfig:
    """Make the config of a run over about 2,000 words, with about 60 rows an item."""
    model = tmp_path / architecture
    if not model.exists():
        {"llama": save_llama, "gpt2": save_gpt2}[architecture](model)
        write_text(tmp_path / "text.txt")
    hookpoints = {
        "llama": ["model.layers.1", "model.layers.0.mlp"],
        "gpt2": ["transformer.h.0"],
    }
    config = RunConfig(
        cache_dir=str(tmp_path / "cache"),
        model=ModelConfig(path=str(model), hookpoints=hookpoints[architecture], batch_contexts=3),
        data=DataConfig(
            path=str(tmp_path / "text.txt"),
            **{"tokens": 600, "context_tokens": CONTEXT, "heldout_fraction": 0.2, **data},
        ),
    )
    config.store.shard_tokens = SHARD
    config.cluster.harvest_workers = 1
    return config


def shard_hashes(store: Path) -> dict[str, str]:
    return {
        str(file.relative_to(store)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(store.rglob("c.*"))
        if file.is_file() and file.parent.name != "valid_rows"
    }


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_stored_rows_are_what_the_model_outputs(tmp_path: Path, architecture: str) -> None:
    config = make_config(tmp_path, architecture)
    harvest_stage.run(config, tmp_path / "run")
    store = open_store(tmp_path / "run" / "store")
    hookpoint = config.model.hookpoints[0]
    columns = {name: store.read(name, 0, store.n_tokens) for name in ("token_id", "document")}
    position = store.read("position", 0, store.n_tokens)
    rows = store.read(hookpoint, 0, store.n_tokens).astype(np.float32)
    assert 600 <= store.n_tokens < 600 + CONTEXT
    assert columns["token_id"].min() > 2  # no BOS, EOS or unknown token
    words = [text.split() for text in (tmp_path / "text.txt").read_text().split("\n\n")]
    for document, place, token in zip(
        columns["document"], position, columns["token_id"], strict=True
    ):
        assert words[document][place] == f"w{token - 3}"

    # Run full contexts through the full model and compare the rows of one item.
    model = load_language_model(config.model, tmp_path / "cache")
    item = first_item(config)
    outputs: list[torch.Tensor] = []
    model.get_submodule(hookpoint).register_forward_hook(
        lambda _m, _i, o: outputs.append(o[0] if isinstance(o, tuple) else o)
    )
    for start in range(0, len(item), 3):
        model(torch.from_numpy(item[start : start + 3]))
    hidden = torch.cat(outputs)[:, 1:].float().flatten(0, 1).numpy()
    kept = hidden[np.isin(item[:, 1:].ravel(), [0, 1], invert=True)]
    stored = rows[: len(kept)]
    assert sorted(map(tuple, kept)) == sorted(map(tuple, stored))
    assert (kept != stored).any()  # permuted


def first_item(config: RunConfig) -> NDArray[np.int64]:
    """Return the token ids [contexts, context_tokens] of item 0."""
    cache = Path(config.cache_dir)
    contexts = prepare_contexts(config.data, load_tokenizer(config.model, cache), cache)
    plan = plan_items(contexts.train, config.seed, config.data.tokens, SHARD)
    return contexts.train.input_ids(plan.contexts(0))


def test_header_and_summary_describe_the_harvest(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    harvest_stage.run(config, tmp_path / "run")
    store = open_store(tmp_path / "run" / "store")
    assert store.finalised and store.arrays == {"model.layers.1": 16, "model.layers.0.mlp": 16}
    provenance = store.header.provenance
    assert provenance["dropped_positions"] == [0] and provenance["context_tokens"] == CONTEXT
    assert all(len(provenance[f"{name}_sha256"]) == 64 for name in ("weights", "tokenizer"))
    first = store.read("model.layers.1", 0, int(store.valid_rows[0])).astype(np.float64)
    assert store.header.calibration is not None
    moments = store.header.calibration["model.layers.1"]
    np.testing.assert_allclose(moments.mean, first.mean(0), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(moments.std, first.std(0), rtol=1e-5, atol=1e-7)
    summary = json.loads((tmp_path / "run" / "harvest.json").read_text())
    assert summary["tokens"] == store.n_tokens and summary["items"] == store.n_items
    assert summary["workers"] == 1 and summary["tokens_per_s"] > 0


def test_one_and_two_workers_write_the_same_bytes(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    for workers in (1, 2):
        config.cluster.harvest_workers = workers
        harvest_stage.run(config, tmp_path / f"run-{workers}")
    one, two = (shard_hashes(tmp_path / f"run-{n}" / "store") for n in (1, 2))
    assert len(one) == 5 * open_store(tmp_path / "run-1" / "store").n_items
    assert one == two


@pytest.mark.slow
def test_a_killed_worker_loses_and_repeats_nothing(tmp_path: Path) -> None:
    config = make_config(tmp_path, tokens=1200)
    harvest_stage.run(config, tmp_path / "calm")
    config.cluster.harvest_workers = 2
    kills: list[int] = []

    def kill_workers() -> None:
        """Kill all workers when 2 items are committed, and again when 7 are."""
        run = tmp_path / "run"
        for n_items in (2, 7):
            while len(list((run / "store" / "_log").glob("*/*.json"))) < n_items:
                time.sleep(0.002)
            for file in (run / "logs" / "harvest-starts").iterdir():
                pid = int(file.name.split("-")[-2])
                if pid not in kills:
                    kills.append(pid)
                    os.kill(pid, signal.SIGKILL)

    killer = threading.Thread(target=kill_workers, daemon=True)
    killer.start()
    harvest_stage.run(config, tmp_path / "run")
    killer.join(timeout=1)
    assert len(kills) >= 3
    assert shard_hashes(tmp_path / "run" / "store") == shard_hashes(tmp_path / "calm" / "store")
    assert verify_store(tmp_path / "run" / "store") == []


@pytest.mark.slow
def test_a_frozen_worker_does_not_block_the_harvest(tmp_path: Path) -> None:
    config = make_config(tmp_path, tokens=1200)
    harvest_stage.run(config, tmp_path / "calm")
    config.cluster.harvest_workers, config.cluster.placement_timeout_s = 2, 20.0
    frozen: list[int] = []

    def freeze_a_worker() -> None:
        run = tmp_path / "run"
        while len(list((run / "store" / "_log").glob("*/*.json"))) < 2:
            time.sleep(0.002)
        file = min((run / "logs" / "harvest-starts").iterdir())
        frozen.append(int(file.name.split("-")[-2]))
        os.kill(frozen[0], signal.SIGSTOP)

    freezer = threading.Thread(target=freeze_a_worker, daemon=True)
    freezer.start()
    harvest_stage.run(config, tmp_path / "run")
    freezer.join(timeout=1)
    assert frozen
    assert shard_hashes(tmp_path / "run" / "store") == shard_hashes(tmp_path / "calm" / "store")
    assert verify_store(tmp_path / "run" / "store") == []
    summary = json.loads((tmp_path / "run" / "harvest.json").read_text())
    assert summary["tokens"] == open_store(tmp_path / "calm" / "store").n_tokens


@pytest.mark.slow
def test_a_restart_does_only_the_missing_items(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    harvest_stage.run(config, tmp_path / "whole")

    class Enough(Exception):
        pass

    def stop_after_four(pool: Any, work: Any, *more: Any) -> Iterator[ItemResult | None]:
        for done, rows in enumerate(r for r in run(pool, work, *more) if r is not None):
            yield rows
            if done == 3:
                raise Enough

    run = worker_pool.WorkerPool.run
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Enough):
        patch.setattr(worker_pool.WorkerPool, "run", stop_after_four)
        harvest_stage.run(config, tmp_path / "run")
    path = tmp_path / "run" / "store"
    committed = StoreWriter(path).committed_items()
    before = {name: (path / name).stat().st_mtime_ns for name in shard_hashes(path)}
    items = open_store(tmp_path / "whole" / "store").n_items
    assert 4 <= len(committed) < items

    submitted: list[int] = []

    def note_items(pool: Any, work: Any, *more: Any) -> Iterator[ItemResult | None]:
        todo = list(work)
        submitted.extend(item for item, _ in todo)
        return run(pool, todo, *more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker_pool.WorkerPool, "run", note_items)
        harvest_stage.run(config, tmp_path / "run")
    missing = set(range(items)) - committed
    assert submitted == sorted(submitted) and set(submitted) <= missing
    # A worker that is being killed may still commit its current item.
    assert len(missing) - len(submitted) <= config.cluster.harvest_workers
    assert shard_hashes(path) == shard_hashes(tmp_path / "whole" / "store")
    assert {name: (path / name).stat().st_mtime_ns for name in before} == before


def test_a_harvest_resumes_if_the_hookpoints_are_written_in_another_way(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    harvest_stage.run(config, tmp_path / "run")
    whole = shard_hashes(tmp_path / "run" / "store")
    # Begin a second store, and continue it with the full names.
    job = harvest_stage.prepare(config, tmp_path / "other")
    assert job is not None
    spelled = [f"{name}@output" for name in config.model.hookpoints]
    full = replace(config, model=replace(config.model, hookpoints=spelled))
    store = open_store(str(tmp_path / "run" / "store"))
    StoreWriter(
        job.store,
        dict(store.arrays),
        dtype=store.header.dtype,
        codec=store.header.codec,
        shard_tokens=store.header.shard_tokens,
        n_items=store.n_items,
        provenance=store.header.provenance,
        calibration=store.header.calibration,
    )
    harvest_stage.run(full, tmp_path / "other")
    assert shard_hashes(tmp_path / "other" / "store") == whole


def test_a_complete_store_is_left_alone_and_another_one_is_refused(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    harvest_stage.run(config, tmp_path / "run")
    summary = (tmp_path / "run" / "harvest.json").read_text()
    started = time.monotonic()
    harvest_stage.run(config, tmp_path / "run")
    assert time.monotonic() - started < 2
    assert (tmp_path / "run" / "harvest.json").read_text() == summary
    other_data = replace(config, data=replace(config.data, context_tokens=8))
    with pytest.raises(
        StoreMismatchError, match=r"context_tokens: the store has 16, this run has 8"
    ):
        harvest_stage.run(other_data, tmp_path / "run")
    other_model = make_config(tmp_path, "gpt2")
    with pytest.raises(StoreMismatchError, match="weights_sha256"):
        harvest_stage.run(other_model, tmp_path / "run")


def test_a_store_of_a_users_own_rows_is_refused(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    writer = StoreWriter(tmp_path / "own", {"model.layers.1": 5}, shard_tokens=SHARD)
    writer.write_item(0, {"model.layers.1": np.ones((SHARD, 5), np.float32)})
    writer.finalise()
    config.store.path = str(tmp_path / "own")
    with pytest.raises(StoreMismatchError, match=r"in the arrays {'model.layers.1': 5}"):
        harvest_stage.run(config, tmp_path / "run")


def test_a_text_shorter_than_requested_is_stored_completely(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config(tmp_path, tokens=10**6)
    harvest_stage.run(config, tmp_path / "run")
    assert "fewer than data.tokens=1,000,000" in capsys.readouterr().out
    assert open_store(tmp_path / "run" / "store").finalised


def test_harvest_errors_keep_their_type_and_text(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    config.model.hookpoints = ["model.layer.1"]
    with pytest.raises(ModelError, match=r"use one of its modules, such as model.layers.1"):
        harvest_stage.run(config, tmp_path / "run")
    (tmp_path / "short.txt").write_text("w1 w2")
    config = make_config(tmp_path)
    config.data.path = str(tmp_path / "short.txt")
    with pytest.raises(TextError, match="shorter than one context"):
        harvest_stage.run(config, tmp_path / "run")
    config = make_config(tmp_path)
    config.cluster.harvest_workers, config.cluster.placement_timeout_s = 9, 2.0
    expected = r"cluster.harvest_workers=9: only [0-3] workers were placed"
    with pytest.raises(PlacementError, match=expected):
        harvest_stage.run(config, tmp_path / "run")


def test_workers_that_keep_dying_end_the_harvest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_pool, "STARTS_WITHOUT_PROGRESS", 1)
    config = make_config(tmp_path)
    config.cluster.harvest_workers = 1
    starts = tmp_path / "run" / "logs" / "harvest-starts"
    stop = threading.Event()

    def kill_every_start() -> None:
        killed: set[int] = set()
        while not stop.wait(0.05):
            for file in list(starts.glob("*")):
                pid = int(file.name.split("-")[-2])
                if (
                    pid not in killed
                    and len(list(starts.parent.parent.rglob("_log/*/*.json"))) == 0
                ):
                    killed.add(pid)
                    os.kill(pid, signal.SIGKILL)

    killer = threading.Thread(target=kill_every_start, daemon=True)
    killer.start()
    try:
        with pytest.raises(ClusterError, match=r"started . times without finishing an item"):
            harvest_stage.run(config, tmp_path / "run")
    finally:
        stop.set()
        killer.join()


def test_a_second_run_on_a_growing_store_is_refused_and_may_take_over(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    config.store.path = str(tmp_path / "store")
    job = harvest_stage.prepare(config, tmp_path / "one")
    assert job is not None
    hold = threading.Event()
    errors: list[BaseException] = []

    class Cancelled(Exception):
        pass

    def may_start(item: int | None) -> bool:
        if hold.is_set():
            raise Cancelled
        return item is None or item < 2

    def fill() -> None:
        with job.harvest_lock:
            try:
                harvest_stage.fill(job, may_start)
            except Cancelled as error:
                errors.append(error)

    first = threading.Thread(target=fill)
    first.start()
    try:
        while (
            not (Path(config.store.path) / "zarr.json").exists()
            or not open_store(config.store.path).n_items
        ):
            assert first.is_alive()
            time.sleep(0.05)
        with pytest.raises(StoreBusyError, match="is being written by run demo-"):
            harvest_stage.run(config, tmp_path / "two")
    finally:
        hold.set()
        first.join()
    assert len(errors) == 1
    harvest_stage.run(config, tmp_path / "two")
    assert open_store(config.store.path).finalised
    assert verify_store(config.store.path) == []
