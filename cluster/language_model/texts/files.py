"""A text in files: their hash, and their documents in the order of the files."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from lzma import LZMAError
from pathlib import Path
from typing import Any

from cluster.language_model.cache import digest, file_sha256
from cluster.language_model.errors import TextError
from cluster.language_model.text_formats import (
    Document,
    Reading,
    TextFormat,
    format_of,
    formats_by_suffix,
)
from cluster.language_model.text_formats.opening import (
    encoding_error,
    has_byte_order_mark,
    is_utf_8,
)
from cluster.language_model.texts.base import Tally, Text, present

CHECKED_FILES = 16
"""Number of files, spread over all of them, whose first document is read before a run."""
LFS_POINTER = b"version https://git-lfs.github.com/"
SHOWN_FILES = 6
"""Number of file names that are printed."""


@dataclass(frozen=True)
class FileText(Text):
    """The files of a text, in the order in which they are read."""

    root: Path
    """The folder that contains the files, or the file itself if there is only one."""
    files: tuple[Path, ...]
    reading: Reading
    """How the files are read. `alone` is replaced for each file."""
    notes: tuple[str, ...] = ()
    """Lines to print about the choice of the files."""

    def sha256(self, cache_dir: Path) -> str:
        """Return a hash of the names and contents of the files and of how they are read.

        Stores record this hash. What was added to it later is left out where it changes nothing.
        """
        named = []
        for file in self.files:
            with _readable(file):
                named.append((self._name(file), file_sha256(file, cache_dir)))
        formats = formats_by_suffix()
        encoded = [file for file in self.files if format_of(file, formats).may_be_compressed]
        parts: dict[str, Any] = {"files": named, "text_field": self.reading.field}
        if encoded and not is_utf_8(self.reading.encoding):
            parts["encoding"] = self.reading.encoding
        elif any(_begins_with_mark(file) for file in encoded):
            # Before this key existed, the mark was part of the first document.
            parts["byte_order_mark"] = "skipped"
        whole = self.root not in self.files and not format_of(self.files[0], formats).has_fields
        if whole and len(self.files) == 1:
            # Otherwise the hash would equal that of the file itself, which is cut at blank lines.
            parts["document"] = "file"
        return digest(parts)

    def documents(self, tally: Tally | None = None) -> Iterator[Document]:
        """Yield every document that is neither null nor blank, in the order of the files.

        Raises:
            TextError: If a file cannot be read or lacks the field of the text.
        """
        tally = Tally() if tally is None else tally
        formats = formats_by_suffix()
        for file in self.files:
            yield from present(self._documents_of(file, formats), tally)

    def check(self) -> None:
        """Read the first document of some of the files.

        Raises:
            TextError: If a file cannot be read or lacks the field of the text.
        """
        formats = formats_by_suffix()
        step = max(1, len(self.files) // CHECKED_FILES)
        for file in self.files[::step]:
            for _ in present(self._documents_of(file, formats), Tally()):
                break

    def summary(self) -> list[str]:
        """Return the number, size and names of the files, and what is left out."""
        sizes = [file.stat().st_size for file in self.files]
        names = [self._name(file) for file in self.files]
        if len(names) > SHOWN_FILES:
            names = [*names[: SHOWN_FILES - 1], "…", names[-1]]
        count = f"{len(self.files):,} files" if len(self.files) > 1 else "1 file"
        empty = [f"files without content: {sizes.count(0):,}"] if 0 in sizes else []
        files = f"{count}, {_size(sum(sizes))}, of {self.root}: {', '.join(names)}"
        return [files, *self.notes, *empty]

    def _documents_of(
        self, file: Path, formats: Mapping[str, TextFormat]
    ) -> Iterator[Document | None]:
        reading = replace(self.reading, alone=file == self.root)
        try:
            with _readable(file):
                _require_content(file)
                yield from format_of(file, formats).documents(file, reading)
        except UnicodeError as error:
            raise encoding_error(file, reading.encoding, error) from error

    def _name(self, file: Path) -> str:
        return file.name if file == self.root else file.relative_to(self.root).as_posix()


@contextmanager
def _readable(file: Path) -> Iterator[None]:
    """Raise a TextError that names the file if it cannot be read or decompressed."""
    try:
        yield
    except (OSError, EOFError, zlib.error, LZMAError) as error:
        raise TextError(f"could not read {file}: {error}") from error


def _begins_with_mark(file: Path) -> bool:
    with _readable(file):
        return has_byte_order_mark(file)


def _require_content(file: Path) -> None:
    """Reject a Git LFS pointer, the small placeholder of a file that was not downloaded.

    Raises:
        TextError: If the file is a pointer.
    """
    with file.open("rb") as stream:
        if stream.read(len(LFS_POINTER)) == LFS_POINTER:
            raise TextError(f"{file} is a Git LFS pointer, not the file itself; run `git lfs pull`")


def _size(n_bytes: int) -> str:
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if n_bytes >= factor:
            return f"{n_bytes / factor:.1f} {unit}"
    return f"{n_bytes} bytes"
