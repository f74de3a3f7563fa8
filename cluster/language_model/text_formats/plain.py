"""Text without structure."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from cluster.language_model.errors import TextError
from cluster.language_model.text_formats.base import Reading, TextFormat
from cluster.language_model.text_formats.opening import open_text


class Plain(TextFormat):
    """Text without structure."""

    suffixes = (".txt", ".md")
    may_be_compressed = True
    has_fields = False

    def documents(self, file: Path, reading: Reading) -> Iterator[str]:
        """Yield the whole file or, if it is the only file, its blocks between blank lines."""
        if reading.kind != "text":
            raise TextError(
                f"{file}: expected a file with the field {reading.field!r}, such as JSON Lines or "
                f"Parquet, because data.kind={reading.kind}"
            )
        with open_text(file, reading.encoding) as lines:
            if not reading.alone:
                yield lines.read()
                return
            block: list[str] = []
            for line in lines:
                if line.strip():
                    block.append(line)
                elif block:
                    yield "".join(block)
                    block = []
            if block:
                yield "".join(block)


PLAIN = Plain()
