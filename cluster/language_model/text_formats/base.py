"""The interface of a text format."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.language_model.text_formats.documents import Document, document_of


@dataclass(frozen=True)
class Reading:
    """Settings for reading the documents of a file."""

    field: str = "text"
    """Field or column with the text, in formats that have fields. Dots select nested fields."""
    encoding: str = "utf-8"
    """Character encoding of formats that are text."""
    kind: str = "text"
    """What a document is: `data.kind`."""
    alone: bool = True
    """True if the source is this single file rather than a folder of files."""


class TextFormat(ABC):
    """A kind of text file, recognised by its suffix."""

    suffixes: tuple[str, ...]
    """Suffixes of the format's files in lower case, such as `.txt`. No two formats may share a
    suffix."""
    may_be_compressed: bool = False
    """True if the format's files may be compressed. `documents` must then open them with
    `open_text`, which decompresses them."""
    has_fields: bool = True
    """True for data with named fields. If a folder has such files, its files of formats without
    fields, such as notes and lists of addresses, are not read."""

    @abstractmethod
    def documents(self, file: Path, reading: Reading) -> Iterator[Document | None]:
        """Yield the documents of a file in a fixed order, and None for a null.

        The caller counts and skips nulls and blank documents.

        Raises:
            TextError: If the content is not of this format, or a document lacks the field.
            UnicodeDecodeError: If the content is not text in `reading.encoding`. The caller reports
                the error.
            OSError: If the file cannot be read. The caller reports the error.
        """


class Records(TextFormat):
    """A format whose files hold one record per document."""

    @abstractmethod
    def values(self, file: Path, reading: Reading) -> Iterator[tuple[str, Any]]:
        """Yield the place of each record, such as "line 3", and the value of its field.

        Raises:
            TextError: If the content is not of this format, or a record lacks the field.
            UnicodeDecodeError: If the content is not text in `reading.encoding`.
            OSError: If the file cannot be read.
        """

    def documents(self, file: Path, reading: Reading) -> Iterator[Document | None]:
        """Yield the document of each record; see `document_of` for the values that count as one."""
        for place, value in self.values(file, reading):
            yield document_of(value, reading.kind, reading.field, f"{file}, {place}")
