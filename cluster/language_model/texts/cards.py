"""Subsets and splits that the card (`README.md`) of a data set declares.

The card of a data set on the Hub may name the files of each subset (configuration) and split. A
copy of such a data set in a folder is read by the same rules.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from cluster.language_model.errors import TextError
from cluster.language_model.texts.splits import ALL, TRAIN

CARD = "README.md"


class Subset(NamedTuple):
    """A subset whose files are in the folder."""

    name: str
    is_default: bool
    splits: dict[str, list[Path]]
    """Files of each split, in the order of their names."""


def declared_files(
    root: Path, wanted_subset: str | None, wanted_split: str | None, notes: list[str]
) -> list[Path]:
    """Return the files of one subset and split, or [] if the folder's card declares no files.

    Args:
        root: The folder.
        wanted_subset: Subset to read; None means the default, or the only one.
        wanted_split: Split to read; None means train, or the only one; "all" means all.
        notes: Lines to print; this function appends to them.

    Raises:
        TextError: If there is no such subset or split, or one must be chosen.
    """
    subsets = _subsets(root)
    if not subsets:
        return []
    chosen = _choose_subset(subsets, wanted_subset, root)
    splits = chosen.splits
    split = wanted_split or (TRAIN if TRAIN in splits or len(splits) > 1 else next(iter(splits)))
    if split not in (*splits, ALL):
        key = f"data.split={wanted_split!r}" if wanted_split else f"data.path={str(root)!r}"
        raise TextError(
            f"{key}: the subset {chosen.name!r} of {root} has the splits {sorted(splits)}; choose "
            "one with data.split, or set data.split=all"
        )
    names = ", ".join(f"{one.name} ({', '.join(one.splits)})" for one in subsets)
    if len(subsets) > 1 or len(splits) > 1:
        notes.append(f"subset {chosen.name}, split {split}, of those in {CARD}: {names}")
    if split == ALL:
        return sorted({file for files in splits.values() for file in files})
    return splits[split]


def _choose_subset(subsets: list[Subset], wanted: str | None, root: Path) -> Subset:
    names = [one.name for one in subsets]
    if wanted is not None:
        if wanted not in names:
            raise TextError(
                f"data.subset={wanted!r}: expected one of {names}, the subsets of {root}"
            )
        return subsets[names.index(wanted)]
    default = [one for one in subsets if one.is_default]
    if len(default) == 1 or len(subsets) == 1:
        return (default or subsets)[0]
    raise TextError(
        f"data.path={str(root)!r} has the subsets {names}; choose one with data.subset, or files "
        "with data.files"
    )


def _subsets(root: Path) -> list[Subset]:
    """Return the declared subsets of which there are files; others were not downloaded."""
    subsets = []
    for config in _configs(root / CARD):
        name = config.get("config_name")
        splits = _splits(root, config.get("data_files"))
        if isinstance(name, str) and splits:
            is_default = name == "default" or config.get("default") is True
            subsets.append(Subset(name, is_default, splits))
    return subsets


def _configs(card: Path) -> list[dict[str, Any]]:
    if not card.is_file():
        return []
    import yaml
    from huggingface_hub import metadata_load

    try:
        content = metadata_load(card)
    except (OSError, ValueError, yaml.YAMLError):
        return []  # some other README
    configs = (content or {}).get("configs")
    return [one for one in configs if isinstance(one, dict)] if isinstance(configs, list) else []


def _splits(root: Path, declared: Any) -> dict[str, list[Path]]:
    """Return the files of each split that `data_files` of a card declares and the folder has."""
    entries = declared if isinstance(declared, list) else [declared]
    splits: dict[str, set[Path]] = {}
    for entry in entries:
        split, patterns = TRAIN, entry
        if isinstance(entry, dict):
            split, patterns = str(entry.get("split", TRAIN)), entry.get("path")
        for pattern in patterns if isinstance(patterns, list) else [patterns]:
            if isinstance(pattern, str):
                splits.setdefault(split, set()).update(_matching(root, pattern))
    return {split: sorted(files) for split, files in splits.items() if files}


def _matching(root: Path, pattern: str) -> list[Path]:
    if (
        "://" in pattern
        or Path(pattern).is_absolute()
        or ".." in Path(pattern).parts
        or not pattern
    ):
        return []  # only files inside the folder
    return [file for file in root.glob(pattern) if file.is_file()]
