"""What a cell of a sweep leaves in its folder when it ends before its last step."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from sae_core.atomic import read_json, write_json
from sae_core.errors import DivergedError

RECORD = "sweep.json"
STOPPED, FAILED = "stopped", "failed"


class Record(NamedTuple):
    """`stopped`: it diverged and was stopped on purpose; `failed`: an error ended it."""

    state: str
    reason: str


def write_record(run_dir: Path, error: BaseException) -> None:
    """Leaves the state and the reason."""
    state = STOPPED if isinstance(error, DivergedError) else FAILED
    write_json(run_dir / RECORD, {"state": state, "reason": str(error)})


def read_record(run_dir: Path) -> Record | None:
    """What was left; None of a cell that may go on."""
    try:
        found = read_json(run_dir / RECORD)
        return Record(str(found["state"]), str(found["reason"]))
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        return Record(FAILED, f"{RECORD} cannot be read: {error}")


def forget(run_dir: Path) -> None:
    """Whoever trains a cell by itself decides anew how it ends."""
    (run_dir / RECORD).unlink(missing_ok=True)


def forget_failure(run_dir: Path) -> None:
    """A new command tries a failed cell again; one that diverged would diverge again."""
    record = read_record(run_dir)
    if record is not None and record.state == FAILED:
        forget(run_dir)
