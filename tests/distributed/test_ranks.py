"""Test that an action on all ranks succeeds on all of them, or raises on all of them."""

from __future__ import annotations

import json
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from foundation.errors import ConfigError
from sae_core.errors import DamagedCheckpointError
from tests.support.ranks import Ranks

pytestmark = pytest.mark.distributed

TIMEOUT_S = 20.0
"""Time limit of a collective, so that a rank that waits for one that has failed ends the test."""
ERRORS = {
    "typed": lambda rank: DamagedCheckpointError(f"file {rank} is damaged"),
    "config": lambda rank: ConfigError("sae.k", rank, "a number above 1", "raise it"),
    "unknown": lambda rank: OSError(28, f"No space left on disk {rank}"),
}


def act(folder: Path, n_ranks: int, failing: dict[int, str], size: int = 0) -> list[dict[str, Any]]:
    """Run an action twice on all ranks, the first time with errors; return what each rank got.

    Args:
        folder: New folder for the logs and results.
        n_ranks: Number of ranks.
        failing: Rank -> kind of error that its action raises.
        size: Ranks of each group that acts together; 0: all ranks.
    """
    ranks = Ranks(folder, n_ranks, _act, str(folder), failing, size)
    assert ranks.codes() == [0] * n_ranks, ranks.logs()
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(n_ranks)]


def _act(folder: str, failing: dict[int, str], size: int) -> int:
    import torch.distributed as dist

    from sae_core.distributed.ranks import is_rank_zero, on_all_ranks

    before = is_rank_zero()
    dist.init_process_group("gloo", timeout=timedelta(seconds=TIMEOUT_S))
    rank, n_ranks = dist.get_rank(), dist.get_world_size()
    assert before == is_rank_zero() == (rank == 0)
    group = None
    if size:
        members = [list(range(first, first + size)) for first in range(0, n_ranks, size)]
        group, _ = dist.new_subgroups_by_enumeration(members, backend="gloo")

    def action() -> str:
        if rank in failing:
            raise ERRORS[failing[rank]](rank)
        return f"result {rank}"

    got: dict[str, Any] = {"type": None, "notes": []}
    try:
        got["result"] = on_all_ranks(action, group)
    except Exception as error:
        got["type"], got["text"] = type(error).__name__, str(error)
        got["notes"] = getattr(error, "__notes__", [])
    # The ranks are still in step: each one gets its own result.
    got["next"] = on_all_ranks(lambda: rank, group)
    Path(folder, f"{rank}.json").write_text(json.dumps(got))
    dist.barrier()
    dist.destroy_process_group()
    return 0


def test_every_rank_gets_its_own_result(tmp_path: Path) -> None:
    got = act(tmp_path, 3, {})
    assert [one["result"] for one in got] == ["result 0", "result 1", "result 2"]


@pytest.mark.parametrize(
    ("kind", "name", "own", "elsewhere"),
    [
        ("typed", "DamagedCheckpointError", "file 1 is damaged", "file 1 is damaged"),
        ("config", "ConfigError", "sae.k=1: expected a number", "sae.k=1: expected a number"),
        (
            "unknown",
            "OSError",
            "[Errno 28] No space left on disk 1",
            "OSError: [Errno 28] No space",
        ),
    ],
)
def test_an_error_of_one_rank_is_raised_on_all(
    tmp_path: Path, kind: str, name: str, own: str, elsewhere: str
) -> None:
    got = act(tmp_path, 3, {1: kind})
    assert (got[1]["type"], got[1]["notes"]) == (name, [])
    assert got[1]["text"].startswith(own)
    for other in (got[0], got[2]):
        assert other["type"] == ("RuntimeError" if kind == "unknown" else name)
        assert other["text"].startswith(elsewhere)
        assert other["notes"] == ["Raised by rank 1."]
    assert [one["next"] for one in got] == [0, 1, 2]


def test_of_several_errors_each_failing_rank_raises_its_own(tmp_path: Path) -> None:
    got = act(tmp_path, 4, {1: "unknown", 2: "typed"})
    assert [one["type"] for one in got] == [
        "RuntimeError",
        "OSError",
        "DamagedCheckpointError",
        "RuntimeError",
    ]
    assert got[0]["notes"] == got[3]["notes"] == ["Raised by rank 1."]


def test_a_failure_concerns_only_its_group_and_names_the_rank_in_the_run(tmp_path: Path) -> None:
    got = act(tmp_path, 4, {3: "typed"}, size=2)
    assert [one.get("result") for one in got] == ["result 0", "result 1", None, None]
    assert got[2]["notes"] == ["Raised by rank 3."]
    assert [one["next"] for one in got] == [0, 1, 2, 3]
