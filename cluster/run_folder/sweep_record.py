"""The record, in a sweep cell's folder, of why the cell ended before its last step."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from cluster.run_folder.files import SWEEP_RECORD
from foundation.atomic_files import read_json, write_json
from sae_core.errors import DivergedError

STOPPED, FAILED = "stopped", "failed"


class Record(NamedTuple):
    """Why a cell ended early: `stopped` if it diverged, `failed` if any other error ended it."""

    state: str
    reason: str


def write_record(run_dir: Path, error: BaseException) -> None:
    """Write the state and the reason into the cell's folder."""
    state = STOPPED if isinstance(error, DivergedError) else FAILED
    write_json(run_dir / SWEEP_RECORD, {"state": state, "reason": str(error)})


def read_record(run_dir: Path) -> Record | None:
    """Return the cell's record, or None if the cell has none and may be trained.

    An unreadable record counts as a failure.
    """
    try:
        found = read_json(run_dir / SWEEP_RECORD)
        return Record(str(found["state"]), str(found["reason"]))
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        return Record(FAILED, f"{SWEEP_RECORD} is not readable: {error}")


def clear_record(run_dir: Path) -> None:
    """Clear the cell's record, because the cell is about to be trained on its own."""
    (run_dir / SWEEP_RECORD).unlink(missing_ok=True)


def clear_failure(run_dir: Path) -> None:
    """Clear the record of a failed cell, so that the cell is tried again.

    The record of a cell that diverged is kept, because the cell would diverge again.
    """
    record = read_record(run_dir)
    if record is not None and record.state == FAILED:
        clear_record(run_dir)
