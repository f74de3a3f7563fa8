"""Test what a start that fails leaves behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.errors import RankFailedError
from cluster.run_folder.files import CONFIG, METRICS
from cluster.run_folder.opening import open_run
from conf.schema.run import RunConfig
from foundation.errors import ConfigError


def fail(config: RunConfig, error: Exception, made: str | None = None) -> None:
    with pytest.raises(type(error)), open_run(config) as run_dir:
        if made is not None:
            (run_dir / made).touch()
        raise error


def test_a_start_with_wrong_input_leaves_no_folder(tmp_path: Path) -> None:
    config = RunConfig(name="a", runs_dir=str(tmp_path / "deep" / "runs"))
    wrong = ConfigError("sae.k", 0, "at least 1")
    fail(config, wrong)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "deep").mkdir()  # a folder that was there, or is used by another run, stays
    fail(config, wrong)
    assert [path.name for path in tmp_path.rglob("*")] == ["deep"]
    with open_run(config) as run_dir:
        pass
    fail(config, wrong)
    assert (run_dir / CONFIG).exists()


@pytest.mark.parametrize("made", [METRICS, "logs/rank-0.log"])
def test_a_start_that_did_something_keeps_its_folder(tmp_path: Path, made: str) -> None:
    config = RunConfig(name="a", runs_dir=str(tmp_path))
    fail(config, ConfigError("sae.k", 0, "at least 1"), made)
    assert (tmp_path / "a" / made).exists()


def test_a_run_that_failed_itself_keeps_its_folder(tmp_path: Path) -> None:
    fail(RunConfig(name="a", runs_dir=str(tmp_path)), RankFailedError("died"))
    assert (tmp_path / "a" / CONFIG).exists()
