"""Test runs on several stores: batches, meshes, kills, and stores that must be refused."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from activation_store import MixtureStream, StoreWriter, open_store
from activation_store.config import MixedStore
from activation_store.errors import DamagedDataError, IncompleteStoreError
from analysis.status import stage as status_stage
from cluster.planning import stage as planning_stage
from cluster.run_folder.saved_config import load_config, save_config
from cluster.training.batch_order import BatchOrder
from cluster.training.device_gather import to_torch
from cluster.training.mixture_source import MixtureSource
from cluster.training.store_checks import check_store
from cluster.upkeep import verify
from conf.schema.run import RunConfig
from foundation.errors import ConfigError
from sae_core.checkpoint.folder import list_checkpoints
from tests.support.ranks import Ranks
from tests.support.single_rank import (
    BATCH,
    EVERY,
    D,
    assert_same_end,
    last_state,
    make_run,
    make_store,
)
from tests.support.tiny_models import write_text

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make two stores and a run with weight 1 on the first and 3 on the second."""
    folder = tmp_path_factory.mktemp("mixture")
    make_store(folder / "one")
    other_store(folder / "other")
    start(mixed_run(folder, "clean"), 1)
    return folder


def other_store(
    path: Path,
    *,
    arrays: dict[str, int] | None = None,
    finalise: bool = True,
    bad: bool = False,
    items: int = 3,
) -> None:
    """Write a store with rows of another distribution."""
    rng = np.random.default_rng(1)
    arrays = arrays or {"acts": D}
    writer = StoreWriter(path, arrays, dtype="float32", shard_tokens=256)
    for item in range(items):
        rows = {
            name: rng.standard_normal((256, d)).astype(np.float32) for name, d in arrays.items()
        }
        if bad:
            rows["acts"][7, 0] = np.inf
        writer.write_item(item, rows)
    if finalise:
        writer.finalise()


def mixed_run(
    folder: Path, name: str, change: Callable[[RunConfig], None] = lambda config: None
) -> Path:
    run_dir = make_run(folder / name, folder / "one")
    config = load_config(run_dir / "config.yaml")
    config.store.mixture = [MixedStore(str(folder / "other"), 3.0)]
    change(config)
    save_config(config, run_dir / "config.yaml")
    return run_dir


def start(run_dir: Path, n_ranks: int) -> None:
    ranks = Ranks(run_dir / "ranks", n_ranks, _rank, str(run_dir))
    assert ranks.codes() == [0] * n_ranks, ranks.logs()


def _rank(run_dir: str) -> int:
    from cluster import rank

    sys.argv = ["rank", run_dir]
    rank.main()
    return 0


def test_a_killed_run_ends_like_an_undisturbed_one(folder: Path) -> None:
    run_dir = mixed_run(folder, "killed")
    ranks = Ranks(run_dir / "ranks", 1, _rank, str(run_dir))
    while not list_checkpoints(run_dir / "checkpoints"):
        assert ranks.processes[0].is_alive(), ranks.logs()
        time.sleep(0.005)
    ranks.processes[0].kill()
    assert ranks.codes() == [-signal.SIGKILL]
    start(run_dir, 1)
    assert_same_end(folder / "clean", run_dir)


@pytest.mark.parametrize(("latent", "data"), [(2, 1), (1, 2)])
def test_a_mesh_ends_where_one_rank_does(folder: Path, latent: int, data: int) -> None:
    def mesh(config: RunConfig) -> None:
        config.parallel.latent, config.parallel.data = latent, data

    run_dir = mixed_run(folder, f"mesh-{latent}-{data}", mesh)
    start(run_dir, latent * data)
    alone, spread = last_state(folder / "clean"), last_state(run_dir)
    for name in ("acts.W_dec", "acts.W_enc"):
        assert torch.allclose(alone[name], spread[name], atol=1e-4), name


def test_other_weights_are_another_stream(folder: Path) -> None:
    run_dir = mixed_run(folder, "changed")
    start(run_dir, 1)
    config = load_config(run_dir / "config.yaml")
    config.store.mixture[0].weight = 1.0
    config.train.tokens += EVERY * BATCH
    save_config(config, run_dir / "config.yaml")
    ranks = Ranks(run_dir / "ranks-2", 1, _rank, str(run_dir))
    assert ranks.codes() == [1]
    assert "the stores, weights and order" in ranks.logs()[0]


def test_replicas_and_the_sample_read_the_stream_of_the_mixture(folder: Path) -> None:
    stores = [open_store(folder / name) for name in ("one", "other")]
    order = {"batch_rows": 48, "window_items": 2, "buffer_rows": 64, "seed": 5}
    stream = MixtureStream(stores, [1.0, 3.0], ["acts"], **order)  # type: ignore[arg-type]
    batches = [to_torch(stream.next().arrays["acts"]).clone() for _ in range(30)]
    stream.close()
    samples: dict[int, torch.Tensor] = {}  # the same on all replicas
    for replica in range(2):
        order_of_replica = BatchOrder(5, 48, 2, 128, replica=replica, n_replicas=2)
        source = MixtureSource(stores, [2.0, 6.0], "acts", order_of_replica)
        for number, whole in enumerate(batches):
            batch = source.next()
            assert batch.first_row == number * 48 + replica * 24
            assert torch.equal(batch.x, whole[replica * 24 : (replica + 1) * 24])
        source.seek(3)
        assert torch.equal(source.next().x, batches[3][replica * 24 : (replica + 1) * 24])
        assert torch.equal(source.sample(480), samples.setdefault(480, source.sample(480)))
        source.close()


def test_the_identity_follows_weights_and_order_but_not_their_scale(folder: Path) -> None:
    stores = [open_store(folder / name) for name in ("one", "other")]

    def identity(weights: list[float], order_seed: int | None = None) -> str:
        order = BatchOrder(5, 48, 2, 128, order_seed)
        source = MixtureSource(stores, weights, "acts", order)
        source.close()
        return source.identity

    assert identity([1, 3]) == identity([2, 6])
    others = [identity([1, 3]), identity([3, 1]), identity([1, 3], order_seed=4)]
    assert len(set(others)) == 3


def test_the_identity_follows_the_number_of_rows(folder: Path, tmp_path: Path) -> None:
    """Item 0 is the same in both stores, but more items give another order."""
    identities = []
    for items in (3, 6):
        other_store(tmp_path / str(items), items=items)
        stores = [open_store(folder / "one"), open_store(tmp_path / str(items))]
        source = MixtureSource(stores, [1, 3], "acts", BatchOrder(5, 48, 2, 128))
        source.close()
        identities.append(source.identity)
    assert identities[0] != identities[1]


def test_a_pipeline_refuses_a_store_before_it_harvests(folder: Path, tmp_path: Path) -> None:
    config = RunConfig(stage="pipeline")
    config.model.hookpoints, config.model.d_model = ["acts"], D
    config.data.path = str(write_text(tmp_path / "text.txt"))
    config.store.path = str(tmp_path / "not-yet")
    config.store.mixture = [MixedStore(str(tmp_path / "missing"))]
    with pytest.raises(ConfigError, match=r"missing.*expected a store"):
        planning_stage.run(config, tmp_path)


def test_status_and_verify_cover_every_store(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other_store(tmp_path / "bad", bad=True)
    run_dir = mixed_run(tmp_path, "run")
    config = load_config(run_dir / "config.yaml")
    config.store.path = str(folder / "one")
    config.store.mixture = [MixedStore(str(tmp_path / "bad"), 2.0)]
    save_config(config, run_dir / "config.yaml")
    with pytest.raises(DamagedDataError, match=f"{tmp_path / 'bad'}: acts: 3 values"):
        verify.run(config, run_dir)
    status_stage.run(config, run_dir)
    printed = " ".join(capsys.readouterr().out.split())
    assert "2,560 tokens in 5 items" in printed and "weight 2 to 1" in printed


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        (None, ConfigError, "store.mixture=.*: expected a store"),
        ({"finalise": False}, IncompleteStoreError, "not finalised"),
        ({"arrays": {"acts": D + 1}}, ConfigError, "the same dtype and width"),
        ({"arrays": {"else": D}}, ConfigError, "arrays='acts'"),
        ({"bad": True}, ConfigError, "finite activations"),
    ],
)
def test_a_store_that_cannot_be_mixed_is_refused_before_training(
    folder: Path,
    tmp_path: Path,
    options: dict[str, object] | None,
    error: type[Exception],
    text: str,
) -> None:
    if options is not None:
        other_store(tmp_path / "s", **options)  # type: ignore[arg-type]
    config = RunConfig()
    config.store.path = str(folder / "one")
    config.train.batch_tokens = BATCH
    config.store.mixture = [MixedStore(str(tmp_path / "s"))]
    with pytest.raises(error, match=text):
        check_store(config)
