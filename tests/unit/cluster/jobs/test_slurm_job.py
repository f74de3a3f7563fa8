"""Test that a Slurm job signals its driver once, however Slurm announces a preemption."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from tests.support.paths import ROOT

DRIVER = """
import signal, sys, time
seen = []
for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, lambda number, _: seen.append(signal.Signals(number).name))
open(sys.argv[1], "w").close()
deadline = time.monotonic() + 60
while not seen and time.monotonic() < deadline:
    time.sleep(0.05)
time.sleep(1.5)
open(sys.argv[1], "w").write(" ".join(seen))
sys.exit(75)
"""
JOB = """
import sys
from pathlib import Path
from cluster.jobs.slurm.job import Attempt
command = [sys.executable, "-c", *sys.argv[1:]]
sys.exit(Attempt(Path("."), command)._run_driver(command))
"""


@pytest.mark.parametrize("to_all", [True, False])
def test_the_driver_is_signalled_once(tmp_path, to_all):
    """Send SIGTERM to all processes, as scancel does, or to the batch process alone."""
    said = tmp_path / "said"
    job = subprocess.Popen(
        [sys.executable, "-c", JOB, DRIVER, str(said)],
        env=os.environ | {"SLURM_JOB_ID": "1", "SLURM_JOB_NUM_NODES": "1", "PYTHONPATH": str(ROOT)},
        start_new_session=True,
    )
    deadline = time.monotonic() + 60
    while not said.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    (os.killpg if to_all else os.kill)(job.pid, signal.SIGTERM)
    assert job.wait(timeout=60) == 75
    assert said.read_text() == "SIGUSR1"
