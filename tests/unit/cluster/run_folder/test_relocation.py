"""Test runs whose folders were moved, copied or renamed, and stages that continue a run."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf

from activation_store import StoreWriter
from activation_store.config import MixedStore
from cluster.run_folder.errors import RunDirError
from cluster.run_folder.files import CHECKPOINTS, CONFIG, METRICS
from cluster.run_folder.opening import open_run
from cluster.run_folder.relocation import follow_link, located
from cluster.run_folder.saved_config import continued, load_config, save_config
from conf.schema.run import RunConfig
from sae_core.architectures.topk.settings import topk_settings
from sae_core.config import TopKConfig
from tests.support.paths import ROOT


def run_config(runs: Path, name: str = "old") -> RunConfig:
    config = RunConfig(name=name, runs_dir=str(runs))
    config.store.path = str(runs / name / "store")
    config.train.tokens = 1_000_000
    return config


def saved_run(runs: Path, name: str = "old") -> RunConfig:
    config = run_config(runs, name)
    (runs / name).mkdir(parents=True)
    save_config(config, runs / name / CONFIG)
    return config


def test_paths_inside_a_run_follow_its_folder(tmp_path: Path) -> None:
    config = run_config(tmp_path / "runs")
    config.store.mixture = [MixedStore(str(tmp_path / "other")), MixedStore("s3://bucket/store")]
    folder = tmp_path / "runs" / "old"
    folder.mkdir(parents=True)
    save_config(config, folder / CONFIG)
    assert load_config(folder / CONFIG) == config
    assert OmegaConf.load(folder / CONFIG).store.path == "store"
    moved = tmp_path / "elsewhere" / "new"
    shutil.copytree(folder, moved)
    found = load_config(moved / CONFIG)
    assert (found.name, found.runs_dir) == ("new", str(tmp_path / "elsewhere"))
    assert found.store.paths == [str(moved / "store"), str(tmp_path / "other"), "s3://bucket/store"]


@pytest.mark.parametrize("relative", [False, True])
def test_configs_of_earlier_versions_have_absolute_paths(tmp_path: Path, relative: bool) -> None:
    before = tmp_path / "gone" / "runs"
    config = run_config(before)
    if relative:
        config.runs_dir = "runs"
    folder = tmp_path / "here" / "copy"
    folder.mkdir(parents=True)
    (folder / CONFIG).write_text(OmegaConf.to_yaml(OmegaConf.structured(config)))
    if relative:  # only what exists in the folder is known to be inside the run
        assert load_config(folder / CONFIG).store.path == config.store.path
        (folder / "store").mkdir()
    assert load_config(folder / CONFIG).store.path == str(folder / "store")
    config.store.path = str(tmp_path / "gone" / "shared")  # outside the run
    assert located(config, folder).store.path == config.store.path


@pytest.mark.parametrize("saved_now", [False, True])
def test_a_store_elsewhere_may_have_the_names_of_the_run(tmp_path: Path, saved_now: bool) -> None:
    config = RunConfig(name="l5", runs_dir="runs")
    config.store.path = str(tmp_path / "big" / "runs" / "l5" / "acts")
    folder = tmp_path / "runs" / "l5"
    folder.mkdir(parents=True)
    if saved_now:
        (folder / "acts").mkdir()  # not what the config means
        save_config(config, folder / CONFIG)
    else:
        (folder / CONFIG).write_text(OmegaConf.to_yaml(OmegaConf.structured(config)))
    assert load_config(folder / CONFIG).store.path == config.store.path
    assert load_config(folder / CONFIG).runs_dir == str(folder.parent)


def test_a_run_may_be_opened_through_a_link(tmp_path: Path) -> None:
    saved_run(tmp_path / "runs", "l5")
    (tmp_path / "runs" / "l5" / METRICS).touch()
    (tmp_path / "link").symlink_to(tmp_path / "runs" / "l5")
    config = run_config(tmp_path / "runs", "l5")
    config.name, config.runs_dir = "link", str(tmp_path)
    follow_link(config)
    with open_run(config) as run_dir:
        assert run_dir == tmp_path / "runs" / "l5"
    assert load_config(run_dir / CONFIG).name == "l5"


def test_cells_of_a_sweep_find_its_store(tmp_path: Path) -> None:
    saved_run(tmp_path / "runs", "grid")
    grid = tmp_path / "runs" / "grid"
    cell = run_config(grid, "n64")
    cell.store.path = str(grid / "store")
    (grid / "n64").mkdir()
    save_config(cell, grid / "n64" / CONFIG)
    assert load_config(grid / "n64" / CONFIG) == cell
    # The folder of a cell as an earlier version wrote it.
    (grid / "n65").mkdir()
    cell.name = "n65"
    (grid / "n65" / CONFIG).write_text(OmegaConf.to_yaml(OmegaConf.structured(cell)))
    grid.rename(tmp_path / "moved")
    for name in ("n64", "n65"):
        found = load_config(tmp_path / "moved" / name / CONFIG)
        assert found.store.path == str(tmp_path / "moved" / "store")


def launch(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "launch.py"), *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "COLUMNS": "300"},
    )


def test_verify_and_status_look_at_the_folder_they_were_given(tmp_path: Path) -> None:
    saved_run(tmp_path / "runs")
    writer = StoreWriter(tmp_path / "runs" / "old" / "store", {"a": 4}, shard_tokens=64)
    writer.write_item(0, np.ones((64, 4), np.float32))
    writer.finalise()
    shutil.copytree(tmp_path / "runs" / "old", tmp_path / "copies" / "copy")
    shard = tmp_path / "copies" / "copy" / "store" / "a" / "c.0.0"
    shard.write_bytes(shard.read_bytes()[:-3])
    there, here = f"runs_dir={tmp_path / 'runs'}", f"runs_dir={tmp_path / 'copies'}"
    intact = launch("stage=verify", "name=old", there)
    assert intact.returncode == 0 and str(tmp_path / "runs" / "old" / "store") in intact.stdout
    damaged = launch("stage=verify", "name=copy", here)
    assert damaged.returncode != 0 and str(tmp_path / "copies" / "copy" / "store") in damaged.stderr
    # A path that is set by hand counts.
    other = launch(
        "stage=verify", "name=copy", here, f"store.path={tmp_path / 'runs' / 'old' / 'store'}"
    )
    assert other.returncode == 0 and "store.path: " in other.stdout
    status = launch("stage=status", "name=copy", here)
    shown = "".join(part.strip() for part in status.stdout.replace("│", "\n").splitlines())
    assert str(tmp_path / "copies" / "copy") in shown
    assert "64 tokens in 1 items" in status.stdout


def test_a_later_stage_takes_the_saved_config(tmp_path: Path) -> None:
    config = run_config(tmp_path)
    config.sae, config.eval.tokens = TopKConfig(k=7), 4096
    (tmp_path / "old").mkdir()
    save_config(config, tmp_path / "old" / CONFIG)
    (tmp_path / "old" / METRICS).touch()
    composed = RunConfig(name="old", runs_dir=str(tmp_path), stage="report", cache_dir="/here")
    found, changes = continued(composed, [])
    assert (topk_settings(found.sae).k, found.stage, found.cache_dir, changes) == (
        7,
        "report",
        "/here",
        [],
    )
    composed.submit.address = "http://mine:8265"  # where a token may be sent is never a run's word
    assert continued(composed, [])[0].submit.address == "http://mine:8265"
    composed.eval.tokens = 512
    found, changes = continued(composed, ["eval.tokens"])
    assert found.eval.tokens == 512 and changes == ["eval.tokens: 4096 -> 512"]
    (tmp_path / "old" / METRICS).unlink()  # an attempt without results counts for nothing
    assert continued(composed, []) == (composed, [])
    composed.name = "none"
    assert continued(composed, []) == (composed, [])


def test_more_tokens_announce_the_learning_rate_and_fewer_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = saved_run(tmp_path)
    config.optim.lr, config.optim.decay_tokens = 1e-3, 100_000
    config.train.batch_tokens = 1000
    save_config(config, tmp_path / "old" / CONFIG)
    (tmp_path / "old" / CHECKPOINTS / "step-00000990").mkdir(parents=True)
    config.train.tokens = 980_000
    before = (tmp_path / "old" / CONFIG).read_text()
    with (
        pytest.raises(RunDirError, match=r"train\.tokens=980000: expected at least 990000"),
        open_run(config),
    ):
        pass
    assert (tmp_path / "old" / CONFIG).read_text() == before
    config.train.tokens = 2_000_000
    with open_run(config):
        pass
    text = " ".join(capsys.readouterr().out.split())
    assert "after 990,000 tokens becomes 0.001 instead of 0.0001" in text
