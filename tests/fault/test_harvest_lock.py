"""Test that one run at a time fills a store, and that a dead run does not block it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from activation_store import HarvestLock
from activation_store.errors import StoreBusyError
from tests.support.paths import ROOT
from tests.support.store_cases import write_store

HOLDER = """
import sys, time
from activation_store import HarvestLock
HarvestLock(sys.argv[1], "one").acquire()
print("held", flush=True)
time.sleep(600)
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write_store(tmp_path / "s", [16], finalise=False)
    return tmp_path / "s"


@pytest.fixture
def holder(path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Start a process that holds the harvest lock."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path)],
        stdout=subprocess.PIPE,
        cwd=ROOT,
    )
    try:
        assert process.stdout and process.stdout.readline() == b"held\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def test_a_process_holds_the_lock_until_it_dies(
    path: Path, holder: subprocess.Popen[bytes]
) -> None:
    two = HarvestLock(path, "two")
    with pytest.raises(StoreBusyError, match=f"written by run one, process {holder.pid} on"):
        two.acquire()
    assert not two.is_held
    holder.kill()
    holder.wait()
    with two:
        two.acquire()
        two.acquire()
        two.check()
        with pytest.raises(StoreBusyError, match="run two"):
            HarvestLock(path, "one").acquire()
    HarvestLock(path, "one").acquire()
