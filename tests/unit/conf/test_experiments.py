"""Test that every shipped experiment can be planned without its model, text or GPUs."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import yaml

from tests.support.paths import ROOT

EXPERIMENTS = sorted(path.stem for path in (ROOT / "conf" / "experiment").glob("*.yaml"))


@pytest.mark.slow
@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_plan(tmp_path, experiment):
    command = [sys.executable, str(ROOT / "launch.py"), "stage=plan", f"experiment={experiment}"]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for words in ("memory per rank", " per rank", "tokens/s", "duration"):
        assert words in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_the_demo_shuffles_its_whole_store_at_once(tmp_path):
    """Otherwise the demo warns that its own batches hold too many tokens of one document."""
    command = [sys.executable, str(ROOT / "launch.py"), "--cfg", "job"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    config = yaml.safe_load(done.stdout)
    store, context_rows = config["store"], config["data"]["context_tokens"] - 1
    rows_per_item = store["shard_tokens"] // context_rows * context_rows
    assert store["window_items"] * rows_per_item >= config["data"]["tokens"]
