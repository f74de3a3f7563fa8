"""Verify stage: check the files of the stores and checkpoints against their checksums."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from activation_store import open_store, verify_store
from activation_store.errors import DamagedDataError
from activation_store.writing.create import shorten
from cluster.run_folder.files import CHECKPOINTS
from conf.schema.run import RunConfig
from foundation.errors import FoundryError
from sae_core.checkpoint.folder import list_checkpoints
from sae_core.checkpoint.verify import checkpoint_problems


def run(config: RunConfig, run_dir: Path) -> None:
    """Check all stores and checkpoints of the run and report each problem.

    Raises:
        DamagedDataError: If any file is damaged or missing, or if stored rows are not finite. The
            message lists all problems.
    """
    console = Console()
    problems = []
    for path in config.store.paths:
        problems += [str(damage) for damage in verify_store(path)]
        problems += [f"{path}: {problem}" for problem in non_finite(path)]
    checkpoints = list_checkpoints(run_dir / CHECKPOINTS)
    for folder in checkpoints:
        problems += checkpoint_problems(folder)
    for killed in sorted((run_dir / CHECKPOINTS).glob("step-*.tmp")):
        console.print(
            f"verify: {killed} is an unfinished save, not a checkpoint; the next save removes it",
            soft_wrap=True,
        )
    if problems:
        raise DamagedDataError("\n  ".join([f"problems found: {len(problems)}", *problems]))
    stores = ", ".join(config.store.paths)
    console.print(
        f"verify: {stores} and all checkpoints in {run_dir} ({len(checkpoints)}) are intact",
        soft_wrap=True,
    )


def non_finite(path: str) -> list[str]:
    """List the arrays whose committed rows contain NaN or infinity, with the affected items.

    Such rows match their checksum, but a trainer that reads them stops with an error.
    """
    try:
        store = open_store(path)
        found = {name: store.non_finite_items(name) for name in store.arrays}
    except FoundryError:
        return []  # `verify_store` has already reported the problem
    return [
        f"{name}: {sum(items.values())} values are not finite, in items {shorten(list(items))}"
        for name, items in found.items()
        if items
    ]
