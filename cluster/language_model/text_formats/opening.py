"""Open text files: decompress and decode them, and explain decoding errors."""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import lzma
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import IO, Any, cast

from cluster.language_model.errors import TextError

UTF_8 = "utf-8"
PROBED_CHARACTERS = 1024
CONTROLS = bytes(set(range(32)) - set(b"\b\t\n\v\f\r\x1b"))
"""Bytes that text hardly ever contains."""
MARKS = {
    codecs.BOM_UTF8: "UTF-8",
    codecs.BOM_UTF32_LE: "UTF-32",  # before UTF-16, whose mark begins with the same bytes
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
"""Byte-order marks at the start of a text, and the encodings they stand for."""
PACKED = {
    b"\x1f\x8b": ("gzip", ".gz"),
    b"BZh": ("bzip2", ".bz2"),
    b"\xfd7zXZ\x00": ("xz", ".xz"),
    b"\x28\xb5\x2f\xfd": ("zstd", ".zst"),
    b"PK\x03\x04": ("zip", None),
}
"""First bytes of compressed files: name of the compression, and its suffix if it can be read."""


def _open_zstd(file: Path) -> IO[bytes]:
    import pyarrow

    stream = pyarrow.CompressedInputStream(pyarrow.OSFile(str(file)), "zstd")
    return cast("IO[bytes]", io.BufferedReader(stream))


COMPRESSIONS: Mapping[str, Callable[[Path], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    # By default, lzma guesses the format and takes some damaged files for empty ones.
    ".xz": partial(lzma.open, format=lzma.FORMAT_XZ),
    ".zst": _open_zstd,
}
"""Function that opens a compressed file as a stream of bytes, by suffix."""


def compression_of(file: Path) -> str | None:
    """Return the suffix of the file's compression, or None if it is not compressed."""
    suffix = file.suffix.lower()
    return suffix if suffix in COMPRESSIONS else None


def format_suffix(file: Path) -> str:
    """Return the suffix of the file's format in lower case, without that of its compression."""
    return (Path(file.stem).suffix if compression_of(file) else file.suffix).lower()


def open_bytes(file: Path) -> IO[bytes]:
    """Open a file for reading, and decompress it if its suffix names a compression format."""
    compression = compression_of(file)
    opened = COMPRESSIONS[compression](file) if compression else file.open("rb")
    return cast("IO[bytes]", opened)


def open_text(file: Path, encoding: str = UTF_8, newline: str | None = None) -> IO[str]:
    """Open a text file for reading, and decompress it if its suffix names a compression format.

    A byte-order mark at the start of UTF-8 text is skipped.

    Args:
        file: The file.
        encoding: Its character encoding.
        newline: As in `open`. By default all kinds of line ends become newlines.

    Raises:
        TextError: If the text is full of control characters, because it is in another encoding or
            is not text.
    """
    with open_bytes(file) as stream:
        probe = stream.read(PROBED_CHARACTERS)
    wide = encoding.lower().replace("-", "").replace("_", "").startswith(("utf16", "utf32"))
    if not wide and _has_controls(probe):
        raise TextError(f"{file} is not {_named(encoding)} text: {_reason(probe)}")
    if is_utf_8(encoding):
        encoding = "utf-8-sig"
    return io.TextIOWrapper(open_bytes(file), encoding=encoding, newline=newline)


def has_byte_order_mark(file: Path) -> bool:
    """Return True if a file begins with the byte-order mark of UTF-8."""
    with open_bytes(file) as stream:
        return stream.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8


def encoding_error(file: Path, encoding: str, error: UnicodeError) -> TextError:
    """Return the error for a file that is not text in `encoding`. It names the line."""
    with open_bytes(file) as stream:
        probe = stream.read(PROBED_CHARACTERS)
    line = _bad_line(file, encoding)
    place = f"{file}, line {line}" if line else str(file)
    return TextError(
        f"{place}: the file is not {_named(encoding)} text ({error}): {_reason(probe)}"
    )


def _has_controls(probe: bytes) -> bool:
    """Return True if many bytes are control characters, as in UTF-16 and in data.

    UTF-16 without a byte-order mark may be valid UTF-8.
    """
    return len(probe.translate(None, CONTROLS)) < len(probe) * 0.9


def _named(encoding: str) -> str:
    return "UTF-8" if is_utf_8(encoding) else encoding


def is_utf_8(encoding: str) -> bool:
    """Return True if this is one of the names of UTF-8."""
    return codecs.lookup(encoding).name == UTF_8


def _reason(probe: bytes) -> str:
    """Return what the first bytes of a file reveal about its encoding, and how to fix the error."""
    for mark, name in MARKS.items():
        if probe.startswith(mark) and name != "UTF-8":
            return f"it begins with the byte-order mark of {name}; set data.encoding={name.lower()}"
    for first, (name, suffix) in PACKED.items():
        if probe.startswith(first):
            fix = f"rename it to end in {suffix}" if suffix else "decompress it"
            return f"it is compressed with {name}; {fix}"
    if _has_controls(probe):
        return (
            "it has many control characters; if it is UTF-16 text, set data.encoding=utf-16-le or "
            "utf-16-be"
        )
    return (
        "set data.encoding to the encoding it was written in, such as cp1252 or utf-16, or convert "
        "it with iconv -f ENCODING -t UTF-8"
    )


def _bad_line(file: Path, encoding: str) -> int | None:
    """Return the number of the first line that cannot be decoded, or None if it is not known."""
    with open_bytes(file) as stream:
        for number, line in enumerate(stream, start=1):
            try:
                line.decode(encoding)
            except UnicodeError:
                return number
    return None  # an encoding whose lines cannot be decoded one by one
