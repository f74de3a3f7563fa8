"""Formats of text files: how a file is split into documents.

| format | files | document |
|---|---|---|
| plain | `.txt`, `.md` | each file of a folder, or each block between blank lines of one file |
| jsonl | `.jsonl` | the text field of each line, or the line itself if it is a JSON string |
| json | `.json` | each element of a list or value of an object: a string, or its text field |
| parquet, arrow | `.parquet`, `.arrow` | the text field of each row |

Files of the first three formats may be gzipped (`.jsonl.gz`). Files are streamed and may therefore
be larger than memory, except for json files and for the plain files of a folder. To add a format,
subclass `TextFormat` and register an instance in `TEXT_FORMATS`.
"""

from __future__ import annotations

import gzip
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from cluster.language_model.errors import TextError
from foundation.registry import Registry

if TYPE_CHECKING:
    import pyarrow

ROWS_PER_READ = 1024


class TextFormat(ABC):
    """A kind of text file, recognised by its suffix."""

    suffixes: tuple[str, ...]
    """Suffixes of the format's files, such as `.txt`. No two formats may share a suffix."""
    may_be_gzipped: bool = False
    """True if the format's files may be gzipped. `documents` must then read both plain and gzipped
    files; see `open_text`."""

    @abstractmethod
    def documents(self, file: Path, field: str, alone: bool) -> Iterator[str]:
        """Yield the documents of a file in a fixed order. The caller skips blank documents.

        Args:
            file: The file.
            field: Field or column with the text, in formats that have fields.
            alone: True if the source is this single file rather than a folder of files.

        Raises:
            TextError: If the content is not of this format, or a document lacks the field.
            UnicodeDecodeError: If the content is not UTF-8. The caller reports the error.
            OSError: If the file cannot be read. The caller reports the error.
        """


class Plain(TextFormat):
    """Text without structure."""

    suffixes = (".txt", ".md")
    may_be_gzipped = True

    def documents(self, file: Path, field: str, alone: bool) -> Iterator[str]:
        """Yield the whole file or, if it is the only file, its blocks between blank lines."""
        with open_text(file) as lines:
            if not alone:
                yield lines.read()
                return
            block: list[str] = []
            for line in lines:
                if line.strip():
                    block.append(line)
                elif block:
                    yield "".join(block)
                    block = []
            yield "".join(block)


class JsonLines(TextFormat):
    """A JSON value in each line."""

    suffixes = (".jsonl",)
    may_be_gzipped = True

    def documents(self, file: Path, field: str, alone: bool) -> Iterator[str]:
        """Yield the text of each line that is not blank."""
        with open_text(file) as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield _text_of(_parse(line, f"{file}, line {number}"), field, file)


class Json(TextFormat):
    """One JSON list or object of documents, read as a whole."""

    suffixes = (".json",)
    may_be_gzipped = True

    def documents(self, file: Path, field: str, alone: bool) -> Iterator[str]:
        """Yield the text of each element of a list, or of each value of an object."""
        with open_text(file) as stream:
            top = _parse(stream.read(), str(file))
        if isinstance(top, dict):
            # An object with the text field is one document; otherwise its values are the documents.
            single = isinstance(top.get(field), str)
            top = [top] if single else list(top.values())
        if not isinstance(top, list):
            raise TextError(
                f"{file}: expected a JSON list or object of documents, not {type(top).__name__}"
            )
        for value in top:
            yield _text_of(value, field, file)


class Columns(TextFormat):
    """A table with a column of strings, read in batches of rows."""

    def documents(self, file: Path, field: str, alone: bool) -> Iterator[str]:
        """Yield the values of the column, without nulls."""
        from pyarrow import ArrowInvalid

        try:
            for batch in self.batches(file, field):
                yield from (text for text in batch if text is not None)
        except ArrowInvalid as error:
            raise TextError(f"could not read {file}: {error}") from error

    @abstractmethod
    def batches(self, file: Path, field: str) -> Iterator[list[str | None]]:
        """Yield the column in batches.

        Raises:
            ArrowInvalid: If the content is not of this format.
            TextError: If there is no such column, or it does not hold strings.
        """


class Parquet(Columns):
    """Parquet files."""

    suffixes = (".parquet",)

    def batches(self, file: Path, field: str) -> Iterator[list[str | None]]:
        """Yield the column in batches of up to `ROWS_PER_READ` rows; others are not read."""
        import pyarrow.parquet

        table = pyarrow.parquet.ParquetFile(file)
        _require_column(field, table.schema_arrow, file)
        for batch in table.iter_batches(batch_size=ROWS_PER_READ, columns=[field]):
            yield batch.column(0).to_pylist()


class Arrow(Columns):
    """Arrow streams, the format of a saved Hugging Face dataset."""

    suffixes = (".arrow",)

    def batches(self, file: Path, field: str) -> Iterator[list[str | None]]:
        """Yield the batches of the stream."""
        import pyarrow

        with pyarrow.memory_map(str(file)) as source, pyarrow.ipc.open_stream(source) as stream:
            _require_column(field, stream.schema, file)
            for batch in stream:
                yield batch.column(batch.schema.get_field_index(field)).to_pylist()


PLAIN = Plain()
JSON_LINES = JsonLines()
JSON = Json()
PARQUET = Parquet()
ARROW = Arrow()

TEXT_FORMATS: Registry[TextFormat] = Registry(
    kind="text format",
    key="data.path",
    group="text_formats",
    builtin={
        "plain": "cluster.language_model.text_formats:PLAIN",
        "jsonl": "cluster.language_model.text_formats:JSON_LINES",
        "json": "cluster.language_model.text_formats:JSON",
        "parquet": "cluster.language_model.text_formats:PARQUET",
        "arrow": "cluster.language_model.text_formats:ARROW",
    },
)


def formats_by_suffix() -> dict[str, TextFormat]:
    """Return the format of each suffix.

    Raises:
        TextError: If two formats have the same suffix.
    """
    owners: dict[str, str] = {}
    formats: dict[str, TextFormat] = {}
    for name, text_format in TEXT_FORMATS.items():
        for suffix in text_format.suffixes:
            if suffix in owners:
                raise TextError(
                    f"the text formats {owners[suffix]!r} and {name!r} both read {suffix} files; "
                    "expected one format per suffix; remove the package that adds one of them"
                )
            owners[suffix] = name
            formats[suffix] = text_format
    return formats


def open_text(file: Path) -> IO[str]:
    """Open a UTF-8 text file for reading. If its name ends in `.gz`, decompress it."""
    if file.suffix == ".gz":
        return gzip.open(file, "rt", encoding="utf-8")
    return file.open(encoding="utf-8")


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise TextError(f"{where}: expected JSON: {error}") from error


def _text_of(value: Any, field: str, file: Path) -> str:
    text = value.get(field) if isinstance(value, dict) else value
    if isinstance(text, str):
        return text
    fields = sorted(value) if isinstance(value, dict) else type(value).__name__
    raise TextError(
        f"{file}: expected text in the field data.text_field={field!r} of each document; found "
        f"one with {fields}"
    )


def _require_column(field: str, schema: pyarrow.Schema, file: Path) -> None:
    import pyarrow

    if field not in schema.names:
        raise TextError(
            f"{file}: column data.text_field={field!r} not found; it has the columns {schema.names}"
        )
    kind = schema.field(field).type
    if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
        raise TextError(f"{file}: column {field!r} has the type {kind}; expected strings")
