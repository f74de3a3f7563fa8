"""Every shipped experiment composes, validates and plans."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXPERIMENTS = sorted(path.stem for path in (ROOT / "conf" / "experiment").glob("*.yaml"))


@pytest.mark.slow
@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_plan(tmp_path, experiment):
    command = [sys.executable, str(ROOT / "launch.py"), "stage=plan", f"experiment={experiment}"]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "memory per rank" in done.stdout and "GiB by each rank" in done.stdout
    assert list(tmp_path.iterdir()) == []
