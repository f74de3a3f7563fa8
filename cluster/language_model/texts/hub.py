"""Data sets on the Hugging Face Hub, read by the `datasets` library."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from cluster.language_model.cache import digest
from cluster.language_model.errors import TextError
from cluster.language_model.text_formats import Document, document_of
from cluster.language_model.text_formats.fields import field_of
from cluster.language_model.texts.base import Tally, Text, present

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
COMMIT = re.compile(r"[0-9a-f]{40}")
INSTALL = "`pip install 'datasets>=4'`"
TIMEOUT_S = 10


def is_hub_name(path: str) -> bool:
    """Return True if a path has the form of a name on the Hub, such as `org/name`."""
    return bool(HUB_NAME.fullmatch(path))


def _is_offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


@dataclass(frozen=True)
class HubText(Text):
    """One split of a data set on the Hub."""

    name: str
    """Name of the data set, such as `org/name`."""
    subset: str | None
    """Configuration of the data set; None means its default."""
    split: str
    """Split, or a part of one in the syntax of `datasets`, such as `train[:10%]`."""
    revision: str | None
    """Commit, branch or tag; None means the default branch."""
    field: str
    """Field with the text; dots select nested fields."""
    streaming: bool
    """Read the files over the network as they are needed, instead of downloading them first."""
    kind: str = "text"
    """What a document is: `data.kind`."""

    def sha256(self, cache_dir: Path) -> str:
        """Return a hash of the name, the commit, the part that is read, and the field."""
        return digest(
            {
                "hub": self.name,
                "commit": self.commit,
                "subset": self.subset,
                "split": self.split,
                "text_field": self.field,
            }
        )

    @cached_property
    def commit(self) -> str:
        """The commit that `revision` resolves to.

        Raises:
            TextError: If the Hub does not respond, or has no such data set or revision.
        """
        if self.revision is not None and COMMIT.fullmatch(self.revision):
            return self.revision
        from huggingface_hub import HfApi

        try:
            info = HfApi().dataset_info(self.name, revision=self.revision, timeout=TIMEOUT_S)
        except Exception as error:  # errors of the Hub, of HTTP and of the network
            raise TextError(
                f"data.path={self.name!r} is neither a file or folder on this machine nor a data "
                f"set that the Hub can provide: {_shortened(error)}{_offline_hint()}"
            ) from error
        return str(info.sha)

    def documents(self, tally: Tally | None = None) -> Iterator[Document]:
        """Yield the text of every row that is neither null nor blank.

        Raises:
            TextError: If the data set cannot be loaded, or a row lacks the field.
        """
        rows = self._load(self.streaming)
        yield from present(self._texts(rows), Tally() if tally is None else tally)

    def check(self) -> None:
        """Read the first row over the network, unless the Hub must not be used.

        Raises:
            TextError: If the data set cannot be loaded, or the row lacks the field.
        """
        self._require_library()
        first = re.split(r"[\[+]", self.split)[0]
        # Streams have no parts of splits. Offline, only what was downloaded before can be read.
        if first == "all" or _is_offline():
            return
        rows = replace(self, split=first, revision=self.commit)._load(streaming=True)
        for _ in present(self._texts(rows), Tally()):
            break

    def summary(self) -> list[str]:
        """Return the name, part and commit of the data set."""
        subset = f", subset {self.subset}" if self.subset else ""
        how = "streamed" if self.streaming else "downloaded"
        return [f"{self.name} on the Hub{subset}, split {self.split}, commit {self.commit}, {how}"]

    def _texts(self, rows: Any) -> Iterator[Document | None]:
        iterator = iter(rows)
        number = 0
        while True:
            try:
                row = next(iterator, None)
            except Exception as error:  # the library, its file formats and the network
                raise self._error(error, f", row {number + 1}") from error
            if row is None:
                return
            number += 1
            where = f"{self.name}, split {self.split}, row {number}"
            value = field_of(row, self.field, where)
            yield document_of(value, self.kind, self.field, where)

    def _load(self, streaming: bool) -> Any:
        """Return the rows, with only the column of the field."""
        self._require_library()
        import datasets

        try:
            rows = datasets.load_dataset(
                self.name,
                self.subset,
                split=self.split,
                revision=self.commit,
                streaming=streaming,
            )
        except Exception as error:  # the library, its file formats and the network
            raise self._error(error) from error
        columns = rows.column_names or []
        column = self.field if self.field in columns else self.field.partition(".")[0]
        return rows.select_columns([column]) if column in columns else rows

    def _require_library(self) -> None:
        if importlib.util.find_spec("datasets") is None:
            raise TextError(
                f"data.path={self.name!r} not found; expected a file or a folder on this machine. "
                f"To read a data set of this name from the Hugging Face Hub, run {INSTALL}"
            )

    def _error(self, error: Exception, place: str = "") -> TextError:
        subset = f", data.subset={self.subset!r}" if self.subset else ""
        return TextError(
            f"data.path={self.name!r}{subset}, data.split={self.split!r}{place}: could not read "
            f"the data set from the Hub: {_shortened(error)}{_offline_hint()}"
        )


def _shortened(error: Exception) -> str:
    """Return the type and the first lines of an error."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:3])[:400]}"


def _offline_hint() -> str:
    if not _is_offline():
        return ""
    return "; HF_HUB_OFFLINE is set: set data.revision to the commit that was downloaded before"
