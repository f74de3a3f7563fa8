"""The faults, and how a mutation removes the protection against one.

Each package has one table of mutations; `tests.mutation.tables` collects them.
"""

from __future__ import annotations

from dataclasses import dataclass

FAULTS = {
    1: "all ranks are killed during a save, at each stage",
    2: "one rank is killed during a save",
    3: "the writer of a checkpoint raises an error",
    4: "the disk is full",
    5: "files of a checkpoint are truncated, flipped, swapped, missing or stale",
    6: "SIGTERM or SIGUSR1 arrives",
    7: "a killed and resumed run differs from an uninterrupted one",
    8: "a run resumes on another number of ranks, with uneven n_latents",
    9: "a run is resumed with another config",
    10: "NaN appears on one rank",
    11: "a rank hangs",
    12: "two drivers start the same run",
    13: "a harvest worker is killed while it writes a shard",
    14: "a chunk is missing or damaged",
    15: "a pickle, header, path or metadata is malicious",
    16: "a name contains <script>",
    17: "a Ray worker, a rank or the driver is killed",
    18: "retention deletes the last valid checkpoint",
    19: "wandb or the network is down",
    20: "secrets get into config, logs or images",
    21: "the object store drops connections or loses replies",
    22: "save, kill, corrupt, prune, resume and reshard happen in any order",
}


@dataclass(frozen=True)
class Edit:
    """A text that must occur exactly once in a file, and its replacement."""

    file: str
    old: str
    new: str


@dataclass(frozen=True)
class Mutation:
    """The removal of one protection."""

    fault: int
    """Number in `FAULTS`. Numbers from 101 on are not in that table and only serve `--only`."""
    what: str
    """The faulty behaviour without the protection."""
    edits: tuple[Edit, ...]
    """Edits that remove the protection."""
    tests: tuple[str, ...]
    """Ids of the tests of which at least one must fail."""
    timeout_s: float = 150.0
    """Time limit of each test; a test that takes longer counts as failed."""


def one_edit(fault: int, what: str, file: str, old: str, new: str, *tests: str) -> Mutation:
    """Return a mutation of one edit."""
    return Mutation(fault, what, (Edit(file, old, new),), tests)
