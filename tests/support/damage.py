"""Damage files: flip a bit, truncate, delete, swap."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path


def flip(file: Path, rng: random.Random) -> None:
    """Flip one random bit."""
    data = bytearray(file.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    file.write_bytes(data)


def truncate(file: Path, rng: random.Random) -> None:
    """Cut the file to a random shorter length, possibly 0."""
    data = file.read_bytes()
    file.write_bytes(data[: rng.randrange(len(data))])


def delete(file: Path, _: random.Random) -> None:
    """Delete the file."""
    file.unlink()


DAMAGES: dict[str, Callable[[Path, random.Random], None]] = {
    "flip": flip,
    "truncate": truncate,
    "delete": delete,
}


def swap(files: Sequence[Path], rng: random.Random) -> tuple[Path, Path] | None:
    """Exchange the contents of two files that differ; return None if all files are equal."""
    one = rng.choice(files)
    others = [file for file in files if file.read_bytes() != one.read_bytes()]
    if not others:
        return None
    other = rng.choice(others)
    data = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(data)
    return one, other


def damage_some(files: Sequence[Path], how: str, rng: random.Random) -> list[Path]:
    """Damage one non-empty file, or two if `how` is "swap"; return the damaged files."""
    there = [file for file in files if file.stat().st_size]
    if not there:
        return []
    if how == "swap":
        return list(swap(there, rng) or ())
    file = rng.choice(there)
    DAMAGES[how](file, rng)
    return [file]
