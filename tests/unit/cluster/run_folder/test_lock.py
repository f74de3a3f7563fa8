"""Test that a run has one driver and one group of ranks at a time."""

from __future__ import annotations

import os

import pytest

from cluster.run_folder import lock as run_dir
from cluster.run_folder.errors import RunDirError
from cluster.run_folder.lock import rank_lock, wait_for_old_ranks
from cluster.run_folder.opening import open_run
from conf.schema.run import RunConfig


def test_a_second_driver_is_refused_and_a_dead_ones_lock_is_free(tmp_path):
    config = RunConfig(name="run", runs_dir=str(tmp_path))
    holder = f"is in use by process {os.getpid()} on"
    with open_run(config), pytest.raises(RunDirError, match=holder), open_run(config):
        pass
    (tmp_path / "run" / "driver.lock").write_text("process 1 on a machine that is gone")
    with open_run(config) as run_dir:
        assert str(os.getpid()) in (run_dir / "driver.lock").read_text()


def test_a_second_group_of_ranks_is_refused(tmp_path):
    with (
        rank_lock(tmp_path, is_rank_zero=True),
        rank_lock(tmp_path, is_rank_zero=False),
        pytest.raises(RunDirError, match="being trained by another group"),
        rank_lock(tmp_path, is_rank_zero=True),
    ):
        pass
    with rank_lock(tmp_path, is_rank_zero=True):
        pass  # free again


def test_ranks_of_an_earlier_attempt_are_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(run_dir, "_OLD_RANKS_TIMEOUT_S", 0.3)
    with (
        rank_lock(tmp_path, is_rank_zero=False),
        pytest.raises(RunDirError, match="earlier attempt are still running"),
    ):
        wait_for_old_ranks(tmp_path)
    wait_for_old_ranks(tmp_path)
