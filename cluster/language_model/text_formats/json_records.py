"""JSON: lines, a list, or one object of documents. The content decides, not the suffix."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from cluster.language_model.errors import TextError
from cluster.language_model.text_formats.base import Reading, Records
from cluster.language_model.text_formats.fields import field_of, missing_field
from cluster.language_model.text_formats.opening import format_suffix, open_text

READ_CHARACTERS = 1 << 20
"""Number of characters of a list that are read at first; more if an element is longer."""
ALL_VALUES = "*"
"""Name of the field for an object whose values are the documents."""


class Json(Records):
    """JSON values: one in each line, the elements of a list, or the parts of one object."""

    suffixes = (".json", ".jsonl", ".ndjson", ".jsonlines")
    may_be_compressed = True

    def values(self, file: Path, reading: Reading) -> Iterator[tuple[str, Any]]:
        """Yield the field of every line, element of a list, or document of one object."""
        field = reading.field
        with open_text(file, reading.encoding) as stream:
            number, first = _first_character(stream)
            if first == "[":
                for place, record in _elements(stream, file):
                    yield place, field_of(record, field, f"{file}, {place}")
            elif first:
                yield from _lines_or_object(stream, number, first, file, field)


def _first_character(stream: IO[str]) -> tuple[int, str]:
    """Return the first character that is not a space, and its line; "" at the end of the file."""
    number = 1
    while True:
        character = stream.read(1)
        if not character.isspace():
            return number, character
        number += character == "\n"


def _lines_or_object(
    stream: IO[str], number: int, first: str, file: Path, field: str
) -> Iterator[tuple[str, Any]]:
    """Yield the values of JSON Lines or, in a `.json` file, of one object on one or more lines."""
    line = first + stream.readline()
    may_be_object = first == "{" and format_suffix(file) == ".json"
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        rest = stream.read() if may_be_object else ""
        if not rest.strip():
            raise _not_json(f"{file}, line {number}", error) from error
        yield from _parts(_parse(line + rest, str(file)), file, field)
        return
    following = _next_line(stream, number)
    if following is None and may_be_object:
        yield from _parts(record, file, field)
        return
    place = f"line {number}"
    yield place, field_of(record, field, f"{file}, {place}")
    while following is not None:
        number, line = following
        place = f"line {number}"
        yield place, field_of(_parse(line, f"{file}, {place}"), field, f"{file}, {place}")
        following = _next_line(stream, number)


def _next_line(stream: IO[str], number: int) -> tuple[int, str] | None:
    """Return the next line after line `number` that is not blank, and its number."""
    for line in stream:
        number += 1
        if line.strip():
            return number, line
    return None


def _elements(stream: IO[str], file: Path) -> Iterator[tuple[str, Any]]:
    """Yield the elements of a list, whose "[" has been read, without reading all of it at once."""
    decode = json.JSONDecoder().raw_decode
    text = ""
    size = READ_CHARACTERS
    number = 0
    while True:
        more = stream.read(size)
        text = text.lstrip() + more
        position = 0
        while True:
            start = _after_separator(text, position, number, file)
            if text[start : start + 1] == "]":
                _require_end(text[start + 1 :] + stream.read(READ_CHARACTERS), file)
                return
            try:
                element, end = decode(text, start)
            except (ValueError, RecursionError) as error:
                if more and not isinstance(error, RecursionError):
                    break
                raise _not_json(f"{file}, element {number + 1}", error) from error
            # A number at the end of the buffer may continue. Texts and objects may not, but what
            # follows them must be read to know whether it is a comma.
            if more and _skip_spaces(text, end) == len(text):
                break
            number += 1
            yield f"element {number}", element
            position = end
        text = text[position:]
        # Reading more each time keeps the work for one long element proportional to its length.
        size = max(READ_CHARACTERS, len(text))


def _after_separator(text: str, position: int, number: int, file: Path) -> int:
    """Return where the next element or the end of the list begins."""
    start = _skip_spaces(text, position)
    if number and text[start : start + 1] == ",":
        return _skip_spaces(text, start + 1)
    if number and text[start : start + 1] not in ("", "]"):
        raise TextError(
            f"{file}, element {number}: expected a comma or the end of the list after it, found "
            f"{text[start : start + 20]!r}"
        )
    return start


def _skip_spaces(text: str, position: int) -> int:
    while text[position : position + 1].isspace():
        position += 1
    return position


def _require_end(rest: str, file: Path) -> None:
    if rest.strip():
        raise TextError(
            f"{file}: expected the end of the file after the JSON list, found "
            f"{rest.strip()[:20]!r}; the lines of JSON Lines must be objects or strings"
        )


def _parts(top: dict[str, Any], file: Path, field: str) -> Iterator[tuple[str, Any]]:
    """Yield the documents of one JSON object.

    It is one document if it has the field, unless the field leads into a list of records, or all
    fields are columns: lists of one length, or objects with the same keys. An object of objects
    holds one document in each.
    """
    where = f"{file}, the JSON object"
    first, _, rest = field.partition(".")
    values = list(top.values())
    if field == ALL_VALUES:
        yield from ((f"key {key!r}", value) for key, value in top.items())
    elif field in top and (columns := _columns(values)) is not None:
        column = top[field]
        for key in columns:
            yield f"{field}[{key!r}]", column[key]
    elif rest and isinstance(top.get(first), list):
        for number, record in enumerate(top[first], start=1):
            place = f"{first}, element {number}"
            yield place, field_of(record, rest, f"{file}, {place}")
    elif field in top or first in top:
        yield "the JSON object", field_of(top, field, where)
    elif values and all(isinstance(value, dict) for value in values):
        for key, record in top.items():
            yield f"key {key!r}", field_of(record, field, f"{file}, key {key!r}")
    else:
        raise TextError(
            f"{missing_field(top, field, where)}; if the values of this object are the documents, "
            "set data.text_field='*'"
        )


def _columns(values: list[Any]) -> range | list[str] | None:
    """Return the keys that all columns share, or None if the values are not columns."""
    if all(isinstance(value, list) for value in values):
        lengths = {len(value) for value in values}
        return range(lengths.pop()) if len(lengths) == 1 else None
    if all(isinstance(value, dict) for value in values):
        keys = list(values[0])
        return keys if all(list(value) == keys for value in values) else None
    return None


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _not_json(where, error) from error


def _not_json(where: str, error: Exception) -> TextError:
    return TextError(f"{where}: expected JSON: {error}")


JSON = Json()
