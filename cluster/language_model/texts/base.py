"""The interface of a text, and the counts of one pass over it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from cluster.language_model.text_formats import Document


@dataclass
class Tally:
    """Counts of one pass over a text."""

    null: int = 0
    """Records that were skipped because their text is null."""
    blank: int = 0
    """Documents that were skipped because they hold nothing but white space."""
    parts: dict[str, int] = field(default_factory=dict)
    """Number of documents from each text of a mixture, by name. Empty without a mixture."""
    ended_by: str = ""
    """Name of the text that ran out first and so ended a mixture."""


class Text(ABC):
    """Documents in a fixed order."""

    @abstractmethod
    def sha256(self, cache_dir: Path) -> str:
        """Return a hash that changes if the documents may have changed.

        Args:
            cache_dir: Folder in which the hashes of files are kept.
        """

    @abstractmethod
    def documents(self, tally: Tally | None = None) -> Iterator[Document]:
        """Yield every document that is neither null nor blank.

        Args:
            tally: Counts of this pass, to which this adds.

        Raises:
            TextError: If a file cannot be read or lacks the field of the text. The message names
                the file and the line, row or element.
        """

    @abstractmethod
    def check(self) -> None:
        """Check that the documents can be read, reading as little as possible.

        Raises:
            TextError: If a file cannot be read or lacks the field of the text.
        """

    @abstractmethod
    def summary(self) -> list[str]:
        """Return lines to print: what is read, what is skipped and why."""


def present(documents: Iterator[Document | None], tally: Tally) -> Iterator[Document]:
    """Yield the documents that are neither null nor blank, and count the others."""
    for document in documents:
        if document is None:
            tally.null += 1
        elif not len(document) or (isinstance(document, str) and document.isspace()):
            tally.blank += 1
        else:
            yield _encodable(document) if isinstance(document, str) else document


def _encodable(text: str) -> str:
    """Replace lone surrogates, which JSON may contain and tokenizers reject."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-8", "replace").decode("utf-8")
    return text
