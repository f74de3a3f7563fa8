"""Memory of this host that a process can use, within the limits of its control groups (cgroups)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

_UNLIMITED = 1 << 60
"""Limits of this size or more mean "no limit": version 1 writes the largest page-aligned number."""


class _Files(NamedTuple):
    """File names of one version of cgroups."""

    limit: str
    used: str
    reclaimable: str
    """Field of `memory.stat` with the page cache that the kernel frees before it refuses memory."""


_V2 = _Files("memory.max", "memory.current", "inactive_file")
_V1 = _Files("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def total_bytes(root: Path = Path("/")) -> int | None:
    """Return the memory of this host, or the smallest limit of this process's cgroups if less.

    Args:
        root: Folder that contains `proc` and `sys`; other than `/` only in tests.

    Returns:
        Bytes; None if the system does not report them.
    """
    sizes = [limit for limit, _ in _cgroups(root)]
    machine = _meminfo(root, "MemTotal")
    if machine is None and root == Path("/"):
        machine = _physical_bytes()
    return min([*sizes, *([] if machine is None else [machine])], default=None)


def available_bytes(root: Path = Path("/")) -> int | None:
    """Return the memory that this process can still allocate without swapping or being killed.

    Page cache that the kernel can free counts as available.

    Args:
        root: Folder that contains `proc` and `sys`; other than `/` only in tests.

    Returns:
        Bytes, at least 0; None if the system does not report them.
    """
    sizes = [limit - used for limit, used in _cgroups(root)]
    machine = _meminfo(root, "MemAvailable")
    free = min([*sizes, *([] if machine is None else [machine])], default=None)
    return None if free is None else max(free, 0)


def _cgroups(root: Path) -> Iterator[tuple[int, int]]:
    """Yield the limit and the unreclaimable use of each limited cgroup that contains this process.

    A limit of an outer cgroup applies to all that are inside it.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        mount, files = root / "sys/fs/cgroup", _V2
        if controllers:
            if "memory" not in controllers.split(","):
                continue
            mount, files = mount / "memory", _V1
        inner = Path(path.lstrip("/"))
        # In a container, the path is often the one seen by the host, although the
        # container's own cgroup is mounted as the root.
        for folder in (inner, *inner.parents):
            found = _limit_and_use(mount / folder, files)
            if found is not None:
                yield found


def _limit_and_use(folder: Path, files: _Files) -> tuple[int, int] | None:
    try:
        limit = int((folder / files.limit).read_text())
        used = int((folder / files.used).read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        used -= int(stat.get(files.reclaimable, 0))
    except (OSError, ValueError):  # no such cgroup, or its limit is "max"
        return None
    return (limit, max(used, 0)) if limit < _UNLIMITED else None


def _meminfo(root: Path, field: str) -> int | None:
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    return None


def _physical_bytes() -> int | None:
    """Return the size of the memory on systems without `/proc/meminfo`."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None
