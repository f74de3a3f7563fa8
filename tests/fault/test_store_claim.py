"""One run at a time fills a store; one that died is out of the way by itself."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from activation_store import Claim
from activation_store.errors import StoreBusyError
from tests.store_cases import write_store

HOLDER = """
import sys, time
from activation_store import Claim
Claim(sys.argv[1], "one").take()
print("held", flush=True)
time.sleep(600)
"""


def test_a_claim_is_one_processs_until_it_dies(tmp_path: Path) -> None:
    path = tmp_path / "s"
    write_store(path, [16], finalise=False)
    command = [sys.executable, "-c", HOLDER, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]) as holder:
        assert holder.stdout and holder.stdout.readline() == b"held\n"
        two = Claim(path, "two")
        with pytest.raises(StoreBusyError, match=f"filled by run one, process {holder.pid} on"):
            two.take()
        assert not two.is_taken
        holder.kill()
        holder.wait()
        with two:
            two.take()
            two.take()
            two.check()
            with pytest.raises(StoreBusyError, match="run two"):
                Claim(path, "one").take()
        Claim(path, "one").take()
