"""The verify stage: every file of the store and of the run's checkpoints against its checksum."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from activation_store import open_store, verify_store
from activation_store.creation import shorten
from activation_store.errors import DamagedDataError, StoreError
from cluster.run_dir import saved_config
from conf.schema import RunConfig
from sae_core.checkpoint.folder import list_checkpoints
from sae_core.checkpoint.verify import checkpoint_problems


def run(config: RunConfig, run_dir: Path) -> None:
    """Names each damaged thing, or says that nothing is.

    Raises:
        DamagedDataError: something is damaged.
    """
    console = Console()
    config = saved_config(run_dir) or config
    problems = []
    for path in config.store.paths:
        problems += [str(damage) for damage in verify_store(path)]
        problems += [f"{path}: {problem}" for problem in non_finite(path)]
    checkpoints = list_checkpoints(run_dir / "checkpoints")
    for folder in checkpoints:
        problems += checkpoint_problems(folder)
    for killed in sorted((run_dir / "checkpoints").glob("step-*.tmp")):
        console.print(
            f"verify: {killed} is no checkpoint but a save that runs, or was killed; the next one "
            "clears it",
            soft_wrap=True,
        )
    if problems:
        raise DamagedDataError("\n  ".join([f"{len(problems)} damaged:", *problems]))
    stores = ", ".join(config.store.paths)
    console.print(f"verify: {stores} and {len(checkpoints)} checkpoints are whole")


def non_finite(path: str) -> list[str]:
    """Arrays whose rows hold NaN or infinities, as they were committed; a trainer would stop."""
    try:
        store = open_store(path)
        found = {name: store.non_finite_items(name) for name in store.arrays}
    except StoreError:
        return []  # `verify_store` has named what is wrong
    return [
        f"{name}: {sum(items.values())} numbers are not finite, in items {shorten(list(items))}"
        for name, items in found.items()
        if items
    ]
