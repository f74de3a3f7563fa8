"""Folders written by `save_to_disk` of Hugging Face datasets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cluster.language_model.errors import TextError
from cluster.language_model.texts.splits import ALL, TRAIN

SPLITS = "dataset_dict.json"
STATE = "state.json"


def saved_files(folder: Path, split: str | None) -> tuple[Path, ...]:
    """Return the Arrow files of a saved dataset in their order; () for any other folder.

    Args:
        folder: The folder.
        split: Split to read; None means train, or the only one; "all" means all.

    Raises:
        TextError: If the split does not exist, or the metadata is damaged or points outside the
            folder.
    """
    if (folder / SPLITS).is_file():
        splits = _chosen(folder, split)
        return tuple(file for name in splits for file in _files(folder / name))
    return _files(folder)


def _chosen(folder: Path, wanted: str | None) -> list[str]:
    splits = _metadata(folder / SPLITS).get("splits")
    if not isinstance(splits, list) or not all(isinstance(split, str) for split in splits):
        raise TextError(f"{folder / SPLITS}: expected a list of splits; save the dataset again")
    if wanted is None and TRAIN not in splits and len(splits) != 1:
        raise TextError(f"{folder} has the splits {splits}; choose one with data.split")
    chosen = wanted or (TRAIN if TRAIN in splits else splits[0])
    if chosen not in (*splits, ALL):
        raise TextError(
            f"data.split={chosen!r}: expected one of the splits of {folder}, {splits}, or {ALL}"
        )
    names = splits if chosen == ALL else [chosen]
    for name in names:
        _inside(folder, name, folder / SPLITS)
    return names


def _files(folder: Path) -> tuple[Path, ...]:
    state = folder / STATE
    if not state.is_file():
        return ()
    entries = _metadata(state).get("_data_files")
    if entries is None:  # another program's state.json
        return ()
    try:
        names = [str(entry["filename"]) for entry in entries]
    except (TypeError, KeyError) as error:
        raise TextError(
            f"{state}: expected _data_files with a filename each; save the dataset again"
        ) from error
    return tuple(_inside(folder, name, state) for name in names)


def _inside(folder: Path, name: str, metadata: Path) -> Path:
    """Return a path in a folder.

    Raises:
        TextError: If the name points outside the folder.
    """
    if Path(name).is_absolute() or ".." in Path(name).parts or not name:
        raise TextError(
            f"{metadata} names {name!r}: expected a file or folder inside {folder}; save the "
            "dataset again"
        )
    return folder / name


def _metadata(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TextError(f"{file}: expected JSON of a saved dataset: {error}") from error
    if not isinstance(content, dict):
        raise TextError(f"{file}: expected a JSON object of a saved dataset")
    return content
