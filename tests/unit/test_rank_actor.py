"""What a rank's process is told before torch loads."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROBE = """
import os, sys
from cluster.rank_group import RankActor
RankActor({folder!r}, 0, 2, alone={alone})
assert "torch" not in sys.modules, "too late: the OpenMP runtime is loaded with torch"
open({answer!r}, "w").write(os.environ.get("OMP_WAIT_POLICY", "unset"))
"""


@pytest.mark.parametrize(("alone", "policy"), [(True, "unset"), (False, "passive")])
def test_threads_spin_only_in_a_rank_that_is_alone(
    tmp_path: Path, alone: bool, policy: str
) -> None:
    (tmp_path / "logs").mkdir()
    answer = tmp_path / "answer"
    program = PROBE.format(folder=str(tmp_path), alone=alone, answer=str(answer))
    environment = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True, timeout=60)
    assert answer.read_text() == policy
