"""The registry of text formats, and the format of a file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from cluster.language_model.errors import TextError
from cluster.language_model.text_formats.base import TextFormat
from cluster.language_model.text_formats.opening import COMPRESSIONS, compression_of, format_suffix
from foundation.registry import Registry

TEXT_FORMATS: Registry[TextFormat] = Registry(
    kind="text format",
    key="data.path",
    group="text_formats",
    builtin={
        "plain": "cluster.language_model.text_formats.plain:PLAIN",
        "json": "cluster.language_model.text_formats.json_records:JSON",
        "csv": "cluster.language_model.text_formats.csv_tables:CSV",
        "parquet": "cluster.language_model.text_formats.columns:PARQUET",
        "arrow": "cluster.language_model.text_formats.columns:ARROW",
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


def format_of(file: Path, formats: Mapping[str, TextFormat] | None = None) -> TextFormat:
    """Return the format of a file, which its suffix determines.

    Args:
        file: The file. It need not exist.
        formats: Format of each suffix. None means all registered ones.

    Raises:
        TextError: If no format has the file's suffix, or the file is compressed and its format does
            not allow that.
    """
    formats = formats_by_suffix() if formats is None else formats
    suffix = format_suffix(file)
    if suffix not in formats:
        raise TextError(
            f"data.path: {file}: expected a file of one of the formats {', '.join(formats)}; some "
            f"of them may be compressed ({', '.join(COMPRESSIONS)})"
        )
    if compression_of(file) and not formats[suffix].may_be_compressed:
        raise TextError(
            f"data.path: {file}: {suffix} files must not be compressed as a whole; decompress "
            "this file"
        )
    return formats[suffix]
