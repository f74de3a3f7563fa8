"""Choose the files of a folder that hold documents.

Hidden files and folders, dataset cards, licences and the metadata of data sets are left out. If the
folder has files with fields, such as JSON Lines or Parquet, its plain files are left out too. If
the names of all files identify their split, the files of one split are chosen.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NoReturn

from cluster.language_model.errors import TextError
from cluster.language_model.text_formats import TextFormat, format_of
from cluster.language_model.text_formats.opening import format_suffix
from cluster.language_model.texts.splits import choose_split

HIDDEN = (".", "__MACOSX", "__pycache__")
"""Prefixes of the names of files and folders that programs keep for their own use."""
CARDS = (
    "readme",
    "license",
    "licence",
    "copying",
    "notice",
    "citation",
    "contributing",
    "changelog",
    "code_of_conduct",
    "dataset_card",
    "datasheet",
)
"""Names without suffix of plain files that describe a folder."""
METADATA = (
    "dataset_infos.json",
    "dataset_info.json",
    "dataset_dict.json",
    "state.json",
    "croissant.json",
    "metadata.json",
    "package.json",
)
"""Names of JSON files that describe a data set."""


def choose_files(
    root: Path, formats: Mapping[str, TextFormat], pattern: str | None, split: str | None
) -> tuple[list[Path], list[str]]:
    """Return the files of a folder that hold documents, in the order of their names, and notes.

    Args:
        root: The folder.
        formats: The format of each suffix.
        pattern: Files to read, relative to the folder, such as `en/*.parquet`. None means all that
            look like documents.
        split: Split to read; None means train if there are splits; "all" reads them all.

    Returns:
        The files, and lines to print about the files that are skipped.

    Raises:
        TextError: If the files are of several formats with fields, or no file is of the split.
    """
    notes: list[str] = []
    files = []
    others: list[str] = []
    described: list[str] = []
    for file in sorted(_visible(root, notes)):
        name = file.relative_to(root).as_posix()
        if pattern is not None and not fnmatchcase(name, pattern):
            continue
        if format_suffix(file) not in formats:
            others.append(name)
        elif pattern is None and _describes(file, formats):
            described.append(name)
        else:
            files.append(file)
    if described:
        notes.append(f"skipped, descriptions of the data: {_shortened(described)}")
    if others:
        notes.append(f"skipped, other formats: {_shortened(others)}")
    files = _of_one_kind(files, formats, root, notes)
    return choose_split(files, root, split, notes), notes


def _visible(root: Path, notes: list[str]) -> Iterator[Path]:
    """Yield all files below a folder that are not hidden, also following links to folders."""
    hidden = []
    seen = {root.resolve()}
    for folder, folders, names in os.walk(root, onerror=_raise, followlinks=True):
        here = Path(folder)
        kept = []
        for name in sorted(folders):
            inner = here / name
            if name.startswith(HIDDEN):
                hidden.append(f"{inner.relative_to(root).as_posix()}/")
            elif not inner.is_symlink() or inner.resolve() not in seen:
                seen.add(inner.resolve())
                kept.append(name)
        folders[:] = kept
        for name in names:
            file = here / name
            if name.startswith(HIDDEN):
                hidden.append(file.relative_to(root).as_posix())
            elif file.is_file():
                yield file
            elif file.is_symlink():
                raise TextError(
                    f"{file}: expected a file, found a link to {os.readlink(file)!r}, which does "
                    "not exist; download it, or remove the link"
                )
    if hidden:
        notes.append(f"skipped, hidden: {_shortened(sorted(hidden))}")


def _raise(error: OSError) -> NoReturn:
    raise TextError(f"could not read the folder {error.filename}: {error.strerror}") from error


def _describes(file: Path, formats: Mapping[str, TextFormat]) -> bool:
    """Return True if, judging by its name, a file describes data rather than holding documents."""
    if formats[format_suffix(file)].has_fields:
        return file.name.lower() in METADATA
    return file.name.lower().split(".")[0].replace("-", "_") in CARDS


def _of_one_kind(
    files: list[Path], formats: Mapping[str, TextFormat], root: Path, notes: list[str]
) -> list[Path]:
    """Return the files with fields if there are any, otherwise the plain ones.

    Raises:
        TextError: If the files with fields are of several formats, because they are likely to hold
            the same documents.
    """
    with_fields = [file for file in files if format_of(file, formats).has_fields]
    plain = [file for file in files if file not in set(with_fields)]
    if not with_fields or not plain:
        chosen = files
    else:
        chosen = with_fields
        names = [file.relative_to(root).as_posix() for file in plain]
        notes.append(f"skipped, plain text next to data files: {_shortened(names)}")
    kinds = {id(format_of(file, formats)) for file in chosen}
    if with_fields and len(kinds) > 1:
        suffixes = Counter(format_suffix(file) for file in chosen)
        found = ", ".join(f"{count} {suffix}" for suffix, count in suffixes.items())
        raise TextError(
            f"data.path={str(root)!r}: expected data files of one format, found {found}, which may "
            f"hold the same documents; choose with data.files, such as "
            f"data.files='*{next(iter(suffixes))}'"
        )
    return chosen


def _shortened(names: list[str]) -> str:
    shown = ", ".join(names[:4])
    return f"{shown} and {len(names) - 4:,} more" if len(names) > 4 else shown
