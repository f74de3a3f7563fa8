"""The record of a run's starts and of the machine that trained it, in `env.json`."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cluster.run_folder.environment import command, commit, environment, hardware, threads, versions
from cluster.run_folder.files import ENVIRONMENT
from foundation.atomic_files import read_json, write_json

_MAX_STARTS = 1000


def record_start(run_dir: Path) -> None:
    """Write the environment of a driver, with the commands of all starts, to `env.json`.

    `starts` lists time (UTC), commit and command of each start of a driver, oldest first.
    """
    here = environment()
    now = datetime.now(UTC).isoformat(timespec="seconds")
    earlier = _earlier(run_dir).get("starts", [])
    starts = [*earlier, {"time": now, "commit": here["commit"], "command": here["command"]}]
    write_json(run_dir / ENVIRONMENT, {**here, "starts": starts[-_MAX_STARTS:]})


def record_training(run_dir: Path) -> None:
    """Add hardware and versions that a trainer rank sees, such as GPUs, to `env.json`.

    The commit and the commands stay those of the driver, which for a cell is that of its sweep.
    """
    earlier = _earlier(run_dir) or _earlier(run_dir.parent)
    write_json(
        run_dir / ENVIRONMENT,
        {"commit": commit(), "command": command()}
        | earlier
        | {"hardware": {**hardware(), "threads": threads()}, "versions": versions()},
    )


def _earlier(folder: Path) -> dict[str, Any]:
    try:
        found = read_json(folder / ENVIRONMENT)
    except (FileNotFoundError, ValueError):  # a damaged file is overwritten
        return {}
    return found if isinstance(found, dict) else {}
