"""Paths inside a run's folder, which remain valid when the folder is moved, copied or renamed.

`config.yaml` holds them relative to the folder of the run, and `runs_dir` as an absolute path. The
cells of a sweep lie in the sweep's folder, and may refer to files there. Earlier versions saved
absolute paths, and `runs_dir` as the user gave it, often relative to a folder that is not known
later.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from pathlib import Path

from cluster.run_folder.files import CONFIG
from conf.schema.run import RunConfig


def with_relative_paths(config: RunConfig, run_dir: Path) -> RunConfig:
    """Return the config with paths inside the run, or inside its sweep, relative to `run_dir`.

    `runs_dir` becomes the absolute path of the folder that holds `run_dir` now.
    """
    root = run_dir.resolve()
    home = root.parent if (root.parent / CONFIG).exists() else root

    def relative(path: str) -> str:
        inside = Path(path).is_absolute() and Path(path).is_relative_to(home)
        return os.path.relpath(path, root) if inside else path

    config = _with_stores(config, relative)
    config.runs_dir = str(root.parent)
    return config


def located(config: RunConfig, run_dir: Path) -> RunConfig:
    """Return a saved config with the name, parent and paths that `run_dir` has now.

    Configs of earlier versions hold absolute paths. A path inside the former folder of the run, or
    of its sweep, is replaced by the same path inside the current folder. If the former folder is
    known only as a relative path, this is done only for paths that exist in the current folder,
    because the path of a store elsewhere may contain the same names.

    Args:
        config: The config as it was saved.
        run_dir: The folder in which it was found.
    """
    root = run_dir.resolve()
    sweep = root.parent if (root.parent / CONFIG).exists() else None
    before = Path(config.runs_dir).expanduser()
    homes = [(before / config.name, root)]
    if sweep is not None:
        homes.append((before, sweep))

    def moved(path: str) -> str:
        if not path or "://" in path:
            return path
        if not Path(path).is_absolute():
            return os.path.normpath(root / path)
        for old, new in homes:
            if old.is_absolute():
                if Path(path).is_relative_to(old):
                    return str(new / Path(path).relative_to(old))
                continue
            _, found, rest = path.partition(f"/{old}/")
            if found and (new / rest).exists():
                return str(new / rest)
        return path

    config = _with_stores(config, moved)
    config.name, config.runs_dir = root.name, str(root.parent)
    return config


def follow_link(config: RunConfig) -> None:
    """If the run's folder is a symbolic link, set the name and parent of the folder it points to.

    Without this, the name of the link would differ from the name that the folder has.
    """
    run_dir = Path(config.runs_dir).expanduser() / config.name
    if run_dir.is_symlink():
        target = run_dir.resolve()
        config.name, config.runs_dir = target.name, str(target.parent)


def _with_stores(config: RunConfig, change: Callable[[str], str]) -> RunConfig:
    config = copy.deepcopy(config)
    config.store.path = change(config.store.path)
    for mixed in config.store.mixture:
        mixed.path = change(mixed.path)
    return config
