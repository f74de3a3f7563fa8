"""Formats of text files: how a file is split into documents.

| format | files | document |
|---|---|---|
| plain | `.txt`, `.md` | each file of a folder, or each block between blank lines of one file |
| json | `.json`, `.jsonl`, `.jsonlines`, `.ndjson` | each line or element of a list |
| csv | `.csv`, `.tsv` | the text column of each row |
| parquet, arrow | `.parquet`; `.arrow`, `.feather`, `.ipc` | the text column of each row |

A `.json` file may also hold one object; see `json_records`.
Files of the first three formats may be compressed (`.gz`, `.bz2`, `.xz`, `.zst`). Suffixes may be
in upper case. Files are streamed and may therefore be larger than memory, except for one JSON
object and for the plain files of a folder. To add a format, subclass `TextFormat` or `Records` and
register an instance in `TEXT_FORMATS`.
"""

from cluster.language_model.text_formats.base import Reading, Records, TextFormat
from cluster.language_model.text_formats.documents import Document, document_of
from cluster.language_model.text_formats.opening import open_text
from cluster.language_model.text_formats.registry import (
    TEXT_FORMATS,
    format_of,
    formats_by_suffix,
)

__all__ = [
    "TEXT_FORMATS",
    "Document",
    "Reading",
    "Records",
    "TextFormat",
    "document_of",
    "format_of",
    "formats_by_suffix",
    "open_text",
]
