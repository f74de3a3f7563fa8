"""Test training while wandb is unreachable: a bounded wait, and the same weights."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from cluster.run_folder.metrics_log import logged_rows
from tests.support.single_rank import assert_same_end, make_run, make_store, train

pytestmark = [pytest.mark.slow, pytest.mark.distributed]


def test_an_unreachable_wandb_does_not_change_a_run(tmp_path: Path) -> None:
    make_store(tmp_path / "store")
    without = make_run(tmp_path / "without", tmp_path / "store")
    train(without)
    down = make_run(tmp_path / "down", tmp_path / "store", wandb="online")
    began = time.monotonic()
    log = train(down, WANDB_BASE_URL="http://127.0.0.1:9", WANDB_API_KEY="0" * 40)
    assert time.monotonic() - began < 100, "the timeout is 5 s; the rest is for slow machines"
    assert "wandb is off: CommError" in log, log
    rows = [len(list(logged_rows(run))) for run in (without, down)]
    assert rows[0] == rows[1] > 0
    assert_same_end(without, down)
