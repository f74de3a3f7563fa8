"""Test that a private Ray cluster starts wherever the temporary folder is."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import ROOT

SESSION = """
import ray
from cluster.ray_session import ray_session
from conf.schema.cluster import ClusterConfig
with ray_session(ClusterConfig()):
    print(ray.get(ray.put(17)))
"""


@pytest.mark.slow
@pytest.mark.ray
def test_a_long_temporary_folder_does_not_stop_ray(tmp_path: Path) -> None:
    folder = tmp_path / ("long" * 20)
    folder.mkdir()
    environment = {key: value for key, value in os.environ.items() if key != "RAY_TMPDIR"}
    done = subprocess.run(
        [sys.executable, "-c", SESSION],
        env=environment | {"TMPDIR": str(folder), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.stdout == "17\n", done.stderr
    assert f"{folder} is too long for the paths of Ray's sockets" in done.stderr
