"""Find everything that is wrong with a checkpoint: damaged files first, then invalid content."""

from __future__ import annotations

from pathlib import Path

from sae_core.checkpoint.folder import OPTIMIZER, WEIGHTS, find_damage, read_state
from sae_core.checkpoint.row_ranges import read_layout
from sae_core.checkpoint.stored_sae import open_checkpoint
from sae_core.errors import CheckpointError


def checkpoint_problems(folder: Path) -> list[str]:
    """Return one line per problem of a checkpoint; empty if it is valid.

    The content is checked only if all files match the manifest.
    """
    problems = find_damage(folder)
    if problems:
        return problems
    try:
        for name in read_state(folder).saes:
            open_checkpoint(folder, name)
        weights, moments = read_layout(folder / WEIGHTS), read_layout(folder / OPTIMIZER)
    except CheckpointError as error:
        return [str(error)]
    for name, moment in moments.items():
        parameter = weights.get(name.rpartition(".")[0])
        if parameter is None or parameter.shape != moment.shape:
            problems.append(f"{folder / OPTIMIZER}: {name} has no parameter of the same shape")
    return problems
