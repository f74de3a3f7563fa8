"""Test the environment that a rank's process sets before torch is loaded."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROBE = """
import os, sys
from cluster.training.rank_actors import RankActor
RankActor({folder!r}, 0, 2, alone={alone})
assert "torch" not in sys.modules, "too late: the OpenMP runtime is loaded with torch"
names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
open({answer!r}, "w").write(" ".join(os.environ.get(name, "unset") for name in names))
"""


@pytest.mark.parametrize(
    ("alone", "user", "found"),
    [
        (True, {}, "unset 3000"),
        (False, {}, "passive 0"),
        # What the driver sets for itself is inherited, and replaced.
        (True, {"GOMP_SPINCOUNT": "3000"}, "unset 3000"),
        (False, {"GOMP_SPINCOUNT": "3000"}, "passive 0"),
        (False, {"GOMP_SPINCOUNT": "7"}, "unset 7"),
        (True, {"OMP_WAIT_POLICY": "passive"}, "passive unset"),
        (True, {"GOMP_SPINCOUNT": "7"}, "unset 7"),
    ],
)
def test_threads_spin_only_in_a_rank_that_is_alone(
    tmp_path: Path, alone: bool, user: dict[str, str], found: str
) -> None:
    (tmp_path / "logs").mkdir()
    answer = tmp_path / "answer"
    program = PROBE.format(folder=str(tmp_path), alone=alone, answer=str(answer))
    own = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    environment = {k: v for k, v in os.environ.items() if k not in own} | user
    subprocess.run([sys.executable, "-c", program], env=environment, check=True, timeout=60)
    assert answer.read_text() == found
