"""Parquet and Arrow: tables with a column of strings, read in batches of rows."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.language_model.errors import TextError
from cluster.language_model.text_formats.base import Reading, Records
from cluster.language_model.text_formats.fields import field_of

if TYPE_CHECKING:
    import pyarrow

ROWS_PER_READ = 1024
FILE_MAGIC = b"ARROW1"
"""First bytes of Arrow's file format. Its stream format has none."""


class Columns(Records):
    """A table with a column of strings or lists of strings, read in batches of rows."""

    def values(self, file: Path, reading: Reading) -> Iterator[tuple[str, Any]]:
        """Yield the values of the column, which may be nested in structs and lists."""
        from pyarrow import ArrowException

        number = 0
        try:
            for batch in self.batches(file, reading):
                name = batch.schema.names[0]
                for value in batch.column(0).to_pylist():
                    number += 1
                    place = f"row {number}"
                    record = {name: value}
                    yield place, field_of(record, reading.field, f"{file}, {place}")
        except ArrowException as error:
            raise TextError(f"could not read {file}, row {number + 1}: {error}") from error
        except UnicodeDecodeError as error:
            raise TextError(f"{file}, rows from {number + 1}: not UTF-8 text ({error})") from error

    @abstractmethod
    def batches(self, file: Path, reading: Reading) -> Iterator[pyarrow.RecordBatch]:
        """Yield batches with a single column: the one that is or contains the field.

        Raises:
            ArrowException: If the content is not of this format.
            TextError: If there is no such column, or its type does not hold documents of this kind.
        """


class Parquet(Columns):
    """Parquet files."""

    suffixes = (".parquet",)

    def batches(self, file: Path, reading: Reading) -> Iterator[pyarrow.RecordBatch]:
        """Yield batches of up to `ROWS_PER_READ` rows; other columns are not read."""
        import pyarrow.parquet

        with pyarrow.parquet.ParquetFile(file) as table:
            column = _document_column(reading, table.schema_arrow, file)
            yield from table.iter_batches(batch_size=ROWS_PER_READ, columns=[column])


class Arrow(Columns):
    """Arrow files (Feather) and streams, the format of a saved Hugging Face dataset."""

    suffixes = (".arrow", ".feather", ".ipc")

    def batches(self, file: Path, reading: Reading) -> Iterator[pyarrow.RecordBatch]:
        """Yield the batches of the file or stream."""
        import pyarrow

        with pyarrow.memory_map(str(file)) as source:
            is_file = source.read(len(FILE_MAGIC)) == FILE_MAGIC
            source.seek(0)
            if is_file:
                with pyarrow.ipc.open_file(source) as table:
                    column = _document_column(reading, table.schema, file)
                    for number in range(table.num_record_batches):
                        yield from _sliced(table.get_batch(number), column)
                return
            with pyarrow.ipc.open_stream(source) as stream:
                column = _document_column(reading, stream.schema, file)
                for batch in stream:
                    yield from _sliced(batch, column)


def _sliced(batch: pyarrow.RecordBatch, column: str) -> Iterator[pyarrow.RecordBatch]:
    """Yield the column in parts of up to `ROWS_PER_READ` rows: a batch may be a whole file."""
    one = batch.select([column])
    for start in range(0, one.num_rows, ROWS_PER_READ):
        yield one.slice(start, ROWS_PER_READ)


def _document_column(reading: Reading, schema: pyarrow.Schema, file: Path) -> str:
    """Return the column that holds the field, and check its type.

    Raises:
        TextError: If there is no such column or nested field, or it holds no documents.
    """
    field = reading.field
    column = field if field in schema.names else field.partition(".")[0]
    if schema.names.count(column) > 1:
        raise TextError(f"{file}: expected one column {column!r}, found several")
    kind = schema.field(column).type if column in schema.names else None
    path = "" if column == field else field.partition(".")[2]
    found = None if kind is None else _nested_type(kind, path)
    if found is None:
        columns = [path for one in schema for path in _paths(one.name, one.type)]
        raise TextError(
            f"{file}: column data.text_field={field!r} not found; use one of its columns, {columns}"
        )
    fits, expected = _TYPES[reading.kind]
    if not fits(found):
        raise TextError(f"{file}: column {field!r} has the type {found}; expected {expected}")
    return column


def _nested_type(kind: pyarrow.DataType, path: str) -> pyarrow.DataType | None:
    """Return the type of the field at a path below a type, or None if there is none."""
    import pyarrow

    if not path:
        return kind
    if _is_list(kind):
        return _nested_type(kind.value_type, path)
    if not pyarrow.types.is_struct(kind):
        return None
    names = [kind.field(number).name for number in range(kind.num_fields)]
    first, _, rest = path.partition(".")
    name, rest = (path, "") if path in names else (first, rest)
    return _nested_type(kind.field(names.index(name)).type, rest) if name in names else None


def _paths(name: str, kind: pyarrow.DataType) -> list[str]:
    """Return the paths of the fields of a column."""
    import pyarrow

    inner = kind.value_type if _is_list(kind) else kind
    if not pyarrow.types.is_struct(inner):
        return [name]
    fields = [inner.field(number) for number in range(inner.num_fields)]
    return [path for one in fields for path in _paths(f"{name}.{one.name}", one.type)]


def _is_text(kind: pyarrow.DataType) -> bool:
    from pyarrow import types

    if _is_list(kind) or types.is_dictionary(kind):
        return _is_text(kind.value_type)
    # A column whose values are all null may have no other type.
    return bool(
        types.is_string(kind)
        or types.is_large_string(kind)
        or types.is_string_view(kind)
        or types.is_null(kind)
    )


def _is_ids(kind: pyarrow.DataType) -> bool:
    from pyarrow import types

    inner = kind.value_type if _is_list(kind) else None
    return bool(types.is_null(kind) or (inner is not None and types.is_integer(inner)))


def _is_messages(kind: pyarrow.DataType) -> bool:
    from pyarrow import types

    inner = kind.value_type if _is_list(kind) else None
    return bool(types.is_null(kind) or (inner is not None and types.is_struct(inner)))


_TYPES = {
    "text": (_is_text, "strings"),
    "token_ids": (_is_ids, "lists of integers, because data.kind=token_ids"),
    "chat": (_is_messages, "lists of messages, because data.kind=chat"),
}
"""For each kind of documents, the test of a column's type, and the type in words."""


def _is_list(kind: pyarrow.DataType) -> bool:
    from pyarrow import types

    tests = ("list", "large_list", "fixed_size_list", "list_view", "large_list_view")
    return any(getattr(types, f"is_{test}")(kind) for test in tests)


PARQUET = Parquet()
ARROW = Arrow()
