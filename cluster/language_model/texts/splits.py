"""Splits of a data set, recognised by the names of its files and folders."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

from cluster.language_model.errors import TextError

ALL = "all"
TRAIN = "train"
WORDS = {
    "train": TRAIN,
    "training": TRAIN,
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
    "eval": "test",
    "evaluation": "test",
}
"""Words that identify a split, as in the `datasets` library."""
_WORD = re.compile(r"[A-Za-z]+")


def choose_split(files: list[Path], root: Path, wanted: str | None, notes: list[str]) -> list[Path]:
    """Return the files of one split, or all files if their names do not identify splits.

    Splits are recognised only if every name identifies one: among other documents, `test.txt` is an
    ordinary document.

    Args:
        files: The files of a folder.
        root: The folder.
        wanted: Split to choose; None means train if there are splits; "all" chooses all files.
        notes: Lines to print; this function appends to them.

    Raises:
        TextError: If there is no file of the split, or no split is requested and train is not among
            them.
    """
    if wanted == ALL or not files:
        return files
    split_of = {file: _split_of(file.relative_to(root)) for file in files}
    counts = Counter(split for split in split_of.values() if split is not None)
    if wanted is not None:
        name = WORDS.get(wanted, wanted)
        chosen = [file for file in files if split_of[file] == name]
        if not chosen:
            raise TextError(
                f"data.split={wanted!r}: expected one of the splits of {root}, "
                f"{sorted(counts) or 'which has none'}, or all"
            )
    elif None in split_of.values() or len(counts) < 2:
        if counts and None in split_of.values():
            names = [file.name for file in files if split_of[file] is not None]
            notes.append(
                f"read like all others, although these names look like splits: "
                f"{', '.join(names[:4])}; "
                "choose with data.split or data.files"
            )
        return files
    elif TRAIN not in counts:
        raise TextError(
            f"data.path={str(root)!r} has the splits {sorted(counts)}; choose one with data.split, "
            "or set data.split=all"
        )
    else:
        chosen = [file for file in files if split_of[file] == TRAIN]
    left_out = Counter(split_of[file] or "no split" for file in files if file not in set(chosen))
    if left_out:
        found = ", ".join(f"{count} of {name}" for name, count in sorted(left_out.items()))
        notes.append(f"skipped, other splits (data.split): {found}")
    return chosen


def _split_of(name: Path) -> str | None:
    """Return the split that a file's name identifies, or else that of the innermost folder."""
    for part in reversed(name.parts):
        words = [WORDS[word] for word in _WORD.findall(part.lower()) if word in WORDS]
        if words:
            return words[0]
    return None
