"""Comma- and tab-separated values with a header."""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator
from pathlib import Path

from cluster.language_model.errors import TextError
from cluster.language_model.text_formats.base import Reading, Records
from cluster.language_model.text_formats.opening import format_suffix, open_text

SEPARATORS = (";", "\t", "|", ",")


class Csv(Records):
    """A table whose first line names the columns."""

    suffixes = (".csv", ".tsv")
    may_be_compressed = True

    def values(self, file: Path, reading: Reading) -> Iterator[tuple[str, str]]:
        """Yield the column's value in each row that is not blank, with the row's last line.

        Semicolons and bars separate the columns if the header shows it.
        """
        # By default, csv refuses fields above 128 KiB. This limit belongs to the process.
        csv.field_size_limit(sys.maxsize)
        with open_text(file, reading.encoding, newline="") as lines:
            header = lines.readline()
            separator = _separator(header, reading.field, format_suffix(file))
            names = next(csv.reader([header], delimiter=separator), [])
            column = _column(names, reading.field, file)
            # Without `strict`, a quote that is never closed would swallow the rest of the file.
            rows = csv.reader(lines, delimiter=separator, strict=True)
            try:
                for row in rows:
                    place = rows.line_num + 1
                    if row and len(row) != len(names):
                        raise TextError(
                            f"{file}, line {place}: expected {len(names)} values as in the header, "
                            f"found {len(row)}; quote texts that contain {separator!r}"
                        )
                    if row:
                        yield f"line {place}", row[column]
            except csv.Error as error:
                raise TextError(
                    f"{file}, line {rows.line_num + 1}: expected values separated by "
                    f"{separator!r}: {error}; check the quotes of this row, or convert the file to "
                    "JSON Lines"
                ) from error


def _separator(header: str, field: str, suffix: str) -> str:
    """Return the separator by which the header contains the field; by default the suffix's own."""
    usual = "\t" if suffix == ".tsv" else ","
    for separator in (usual, *SEPARATORS):
        if field in next(csv.reader([header], delimiter=separator), []):
            return separator
    return usual


def _column(names: list[str], field: str, file: Path) -> int:
    if names.count(field) == 1:
        return names.index(field)
    found = "several columns of this name" if field in names else "no such column"
    raise TextError(
        f"{file}: data.text_field={field!r}: expected one of the columns of the header, found "
        f"{found} in {names}"
    )


CSV = Csv()
