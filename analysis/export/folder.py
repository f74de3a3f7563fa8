"""Replace a folder as a whole, so that readers never see an incomplete export."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sae_core.atomic import fsync_path


@contextmanager
def replaced_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder that replaces `path` when the block ends without an error.

    If the block raises, `path` is left unchanged. A killed process may leave its incomplete folder
    as `.<name>.new.tmp`. If it was killed between the two renames, the previous folder is
    `.<name>.old.tmp` and the complete new one is `.<name>.new.tmp`. The next call removes both.

    Args:
        path: The folder to replace; it need not exist.

    Yields:
        The empty folder to fill.
    """
    new = path.with_name(f".{path.name}.new.tmp")
    old = path.with_name(f".{path.name}.old.tmp")
    for leftover in (new, old):
        shutil.rmtree(leftover, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        yield new
        _fsync_tree(new)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    # A folder that is not empty cannot be replaced by a rename, so move the old one away first.
    if path.exists():
        os.rename(path, old)
    os.rename(new, path)
    fsync_path(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def _fsync_tree(folder: Path) -> None:
    for item in [*folder.rglob("*"), folder]:
        fsync_path(item)
