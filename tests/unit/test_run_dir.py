"""Who may train a run: one group of ranks at a time."""

from __future__ import annotations

import pytest

from cluster import run_dir
from cluster.errors import RunDirError
from cluster.run_dir import rank_lock, wait_for_old_ranks


def test_a_second_group_of_ranks_is_refused(tmp_path):
    with (
        rank_lock(tmp_path, 0),
        rank_lock(tmp_path, 1),
        pytest.raises(RunDirError, match="being trained by another group"),
        rank_lock(tmp_path, 0),
    ):
        pass
    with rank_lock(tmp_path, 0):
        pass  # free again


def test_ranks_of_an_earlier_attempt_are_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(run_dir, "_OLD_RANKS_TIMEOUT_S", 0.3)
    with rank_lock(tmp_path, 1), pytest.raises(RunDirError, match="earlier attempt still run"):
        wait_for_old_ranks(tmp_path)
    wait_for_old_ranks(tmp_path)
