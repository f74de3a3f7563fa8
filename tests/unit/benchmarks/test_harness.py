"""Test timing, tables and provenance of benchmarks, and the peers' rows where installed."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.harness import peers
from benchmarks.harness.errors import PeerError
from benchmarks.harness.table import format_table, write_json
from benchmarks.harness.timing import interleaved
from tests.support.paths import ROOT

WORK = {"L": 64, "D": 16, "B": 32, "k": 4, "dtype": "float32"}


def test_interleaved_rounds_rotate_and_reverse_after_the_warm_up() -> None:
    calls: list[str] = []
    timings = interleaved(
        {name: lambda name=name: calls.append(name) for name in "abc"},  # type: ignore[misc]
        rounds=3,
        warmup=1,
    )
    assert "".join(calls) == "abc" + "cba" + "bca" + "acb"
    assert {name: len(timing.samples_s) for name, timing in timings.items()} == dict.fromkeys(
        "abc", 3
    )


def test_two_callables_each_come_first_half_of_the_time() -> None:
    calls: list[str] = []
    interleaved(
        {name: lambda name=name: calls.append(name) for name in "ab"},  # type: ignore[misc]
        rounds=4,
        warmup=0,
    )
    assert "".join(calls) == "ab" + "ba" + "ba" + "ab"


def test_interleaved_measures_seconds() -> None:
    timings = interleaved({"nap": lambda: time.sleep(0.02), "none": lambda: None}, rounds=3)
    assert timings["nap"].median_s >= 0.02 > timings["none"].median_s
    assert timings["nap"].best_s <= timings["nap"].median_s


def test_interleaved_synchronizes_around_each_call() -> None:
    calls: list[str] = []
    interleaved(
        {"a": lambda: calls.append("a")}, rounds=1, warmup=0, synchronize=lambda: calls.append("|")
    )
    assert "".join(calls) == "|a|"


def test_interleaved_prepares_each_call() -> None:
    calls: list[str] = []
    interleaved(
        {name: lambda name=name: calls.append(name) for name in "ab"},  # type: ignore[misc]
        rounds=1,
        warmup=1,
        prepare=lambda: calls.append("."),
    )
    assert "".join(calls) == ".a.b.b.a"


@pytest.mark.parametrize(("names", "rounds"), [("", 3), ("a", 0)])
def test_no_callables_or_no_rounds_are_refused(names: str, rounds: int) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        interleaved({name: lambda: None for name in names}, rounds=rounds)


def measured_bytes(code: str) -> int:
    """Run `code` in a fresh process, unaffected by earlier tests, and return what it prints."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    if done.stdout.strip() == "None":
        pytest.skip("this kernel does not report resident memory")
    return int(done.stdout)


def test_peak_memory_includes_freed_memory() -> None:
    code = """
from benchmarks.harness.timing import PeakMemory
earlier = b"x" * (200 << 20)  # a peak before the block does not count
del earlier
with PeakMemory() as memory:
    block = bytearray(64 << 20)
    block[::4096] = b"x" * len(block[::4096])
    del block
print(memory.bytes)
"""
    assert 60 << 20 <= measured_bytes(code) <= 90 << 20


def test_peak_memory_includes_reused_memory() -> None:
    code = """
import torch
from benchmarks.harness.timing import PeakMemory
from sae_core.training.malloc import keep_freed_memory
keep_freed_memory()
earlier = torch.zeros(200 << 20, dtype=torch.uint8)
del earlier
with PeakMemory() as memory:
    torch.zeros(64 << 20, dtype=torch.uint8)
print(memory.bytes)
"""
    assert 60 << 20 <= measured_bytes(code) <= 90 << 20


def test_table_aligns_and_gives_units() -> None:
    rows = [
        {
            "work": WORK,
            "system": "ours",
            "op": "step",
            "median_s": 0.0123,
            "ratio": 2.345,
            "tokens_per_s": 83252.0,
            "peak_bytes": 3 << 20,
        },
        {"work": WORK, "system": "peer-with-a-name", "op": "step", "median_s": 1.5},
    ]
    lines = format_table(rows).splitlines()
    assert lines[0].split() == [
        "work",
        "system",
        "op",
        "median",
        "ms",
        "ratio",
        "tokens/s",
        "peak",
        "MiB",
    ]
    assert lines[2].split()[5:] == ["ours", "step", "12.30", "2.35", "83,252", "3"]
    assert lines[3].split()[-4:] == ["1500.00", "-", "-", "-"]
    assert lines[2].index("12.30") + 5 == lines[3].index("1500.00") + 7  # right-aligned


def test_json_carries_its_provenance(tmp_path: Path) -> None:
    path = tmp_path / "results" / "rows.json"
    write_json(path, [{"work": WORK, "system": "ours"}])
    document = json.loads(path.read_text())
    assert document["rows"] == [{"work": WORK, "system": "ours"}]
    assert {"hardware", "versions", "commit", "command"} <= set(document)
    assert document["versions"]["python"]
    assert [file.name for file in path.parent.iterdir()] == ["rows.json"]


def test_absent_peers_give_no_rows_and_a_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(peers, "PEERS_PYTHON", tmp_path / "bin" / "python")
    assert peers.peer_rows(WORK) == []
    assert "make_peers_env.sh" in capsys.readouterr().err


@pytest.mark.skipif(not peers.peers_available(), reason=f"no .venv-peers; {peers.HOW_TO_MAKE}")
def test_failing_peer_raises_with_its_output() -> None:
    with pytest.raises(PeerError, match=r"eai-sparsify.*\n(.|\n)*k out of range"):
        peers.peer_rows({**WORK, "k": 100}, peers=["eai-sparsify"], rounds=1)


@pytest.mark.slow
@pytest.mark.skipif(not peers.peers_available(), reason=f"no .venv-peers; {peers.HOW_TO_MAKE}")
def test_peer_rows() -> None:
    rows = peers.peer_rows(WORK, rounds=2)
    assert [row["system"] for row in rows] == list(peers.PEERS)
    for row in rows:
        assert row["work"] == WORK
        assert row["ratio"] == pytest.approx(row["median_s"] / row["gemm_s"])
        assert row["tokens_per_s"] == pytest.approx(WORK["B"] / row["median_s"])
