"""Replace a folder as a whole, so that a reader never sees half an export."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sae_core.atomic import fsync_path


@contextmanager
def replaced_folder(path: Path) -> Iterator[Path]:
    """Gives an empty folder, which takes the place of `path` when the block ends well.

    When the block raises, `path` stays as it was. A folder that a killed process left half-made is
    `.<name>.new.tmp` and is cleared by the next run; one caught between the two renames is
    `.<name>.old.tmp`, with the whole new one beside it.
    """
    new, old = (path.with_name(f".{path.name}.{part}.tmp") for part in ("new", "old"))
    for leftover in (new, old):
        shutil.rmtree(leftover, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        yield new
        _fsync_tree(new)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    if path.exists():
        os.rename(path, old)
    os.rename(new, path)
    fsync_path(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def _fsync_tree(folder: Path) -> None:
    for item in [*folder.rglob("*"), folder]:
        fsync_path(item)
