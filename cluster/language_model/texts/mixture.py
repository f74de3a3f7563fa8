"""Several texts, mixed document by document in proportion to their weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cluster.language_model.cache import digest
from cluster.language_model.errors import TextError
from cluster.language_model.text_formats import Document
from cluster.language_model.texts.base import Tally, Text


@dataclass(frozen=True)
class Part:
    """One text of a mixture."""

    name: str
    """Its path, as printed."""
    text: Text
    weight: float
    """Share of the characters, or token ids, relative to the weights of the other texts."""


@dataclass(frozen=True)
class Mixture(Text):
    """The documents of several texts, in an order that only the texts and weights determine.

    The next document always comes from the text that is furthest behind its share of the characters
    so far. The mixture ends when the first of its texts runs out, so that the shares hold
    throughout.
    """

    parts: tuple[Part, ...]

    def sha256(self, cache_dir: Path) -> str:
        """Return a hash of the texts and their relative weights, in their order."""
        total = sum(part.weight for part in self.parts)
        shares = [[part.text.sha256(cache_dir), part.weight / total] for part in self.parts]
        return digest({"mixture": shares})

    def documents(self, tally: Tally | None = None) -> Iterator[Document]:
        """Yield the documents of all texts until one has no more.

        Raises:
            TextError: If a text cannot be read, or contains no documents.
        """
        tally = Tally() if tally is None else tally
        streams = [part.text.documents(tally) for part in self.parts]
        characters = [0] * len(self.parts)
        while True:
            behind = min(
                range(len(self.parts)), key=lambda i: (characters[i] / self.parts[i].weight, i)
            )
            name = self.parts[behind].name
            text = next(streams[behind], None)
            if text is None:
                if not characters[behind]:
                    raise TextError(f"data.mixture: {name!r} contains no documents; remove it")
                tally.ended_by = name
                return
            characters[behind] += len(text)
            tally.parts[name] = tally.parts.get(name, 0) + 1
            yield text

    def check(self) -> None:
        """Check each of the texts.

        Raises:
            TextError: If one cannot be read.
        """
        for part in self.parts:
            part.text.check()

    def summary(self) -> list[str]:
        """Return the lines of all texts, each after its share."""
        total = sum(part.weight for part in self.parts)
        lines = []
        for part in self.parts:
            first, *more = part.text.summary()
            lines += [f"{part.weight / total:.1%} of the characters: {first}", *more]
        return lines
