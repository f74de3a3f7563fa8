"""Read the documentation: code blocks with their test comments, links, anchors, code spans."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

MODES = ("run", "compose", "parse", "make", "docker", "shell", "python-names")
"""Valid values of MODE in `<!-- test: MODE ... -->`; docs/development.md describes them."""
TESTED = ("bash", "sh", "shell", "console", "python")
"""Languages whose blocks need a test comment."""
NOT_TESTED = ("text", "toml", "yaml", "json", "mermaid")

_FENCE = re.compile(r"^(`{3,}|~{3,})\s*(\S*)\s*$")
_COMMENT = re.compile(r"^<!-- test: (\S+) ?(.*?) ?-->$")
_LINK = re.compile(r"!?\[(?:[^\[\]]|\[[^\]]*\])*\]\(([^)\s]+)\)")
_CODE_SPAN = re.compile(r"(?<!`)`([^`]+)`(?!`)")
_HEADING = re.compile(r"^#{1,6} (.+)$")


class PageError(AssertionError):
    """Something in a page is wrong; the message names file and line."""


@dataclass(frozen=True)
class Block:
    """One fenced block of code."""

    page: str
    """Page, relative to the checkout."""
    line: int
    """Line of the opening fence."""
    language: str
    text: str
    mode: str
    """One of `MODES`; empty for languages that are not tested."""
    argument: str
    """Rest of the test comment."""

    @property
    def where(self) -> str:
        """Page and line."""
        return f"{self.page}:{self.line}"

    @property
    def commands(self) -> list[list[str]]:
        """The commands of a shell block as words, without comments."""
        joined = self.text.replace("\\\n", " ")
        words = (shlex.split(line, comments=True) for line in joined.splitlines())
        return [command for command in words if command]


@dataclass(frozen=True)
class Page:
    """One Markdown file."""

    root: Path
    name: str
    """Path relative to `root`."""

    @cached_property
    def lines(self) -> list[str]:
        """The lines of the file."""
        return (self.root / self.name).read_text(encoding="utf-8").splitlines()

    @cached_property
    def blocks(self) -> list[Block]:
        """All fenced blocks.

        Raises:
            PageError: If a block's language is missing or unknown, or if a block in a tested
                language has no valid test comment.
        """
        return self._split[0]

    @cached_property
    def prose(self) -> list[tuple[int, str]]:
        """Line numbers and lines outside of blocks."""
        return self._split[1]

    @cached_property
    def _split(self) -> tuple[list[Block], list[tuple[int, str]]]:
        blocks, prose = [], []
        opened: tuple[int, str, str] | None = None
        body: list[str] = []
        for number, line in enumerate(self.lines, start=1):
            fence = _FENCE.match(line.strip())
            if opened is None and fence:
                opened, body = (number, fence[1], fence[2]), []
            elif opened is not None and line.strip() == opened[1]:
                blocks.append(self._block(opened[0], opened[2], "\n".join(body) + "\n"))
                opened = None
            elif opened is not None:
                body.append(line)
            else:
                prose.append((number, line))
        if opened is not None:
            raise PageError(f"{self.name}:{opened[0]}: this block is not closed")
        return blocks, prose

    def _block(self, line: int, language: str, text: str) -> Block:
        where = f"{self.name}:{line}"
        if language in NOT_TESTED:
            return Block(self.name, line, language, text, "", "")
        if language not in TESTED:
            known = ", ".join((*TESTED, *NOT_TESTED))
            raise PageError(f"{where}: language {language!r} of a block: expected one of {known}")
        comment = _COMMENT.match(self.lines[line - 2].strip()) if line > 1 else None
        if comment is None or comment[1] not in MODES:
            raise PageError(
                f"{where}: expected a comment <!-- test: MODE --> on the line before the block, "
                f"with one of {', '.join(MODES)}; see docs/development.md"
            )
        return Block(self.name, line, language, text, comment[1], comment[2])

    @cached_property
    def anchors(self) -> set[str]:
        """Anchors of all headings, as GitHub generates them."""
        headings = (_HEADING.match(line) for _, line in self.prose)
        return {_anchor(heading[1]) for heading in headings if heading}

    @cached_property
    def links(self) -> list[tuple[int, str]]:
        """Line numbers and targets of all links and images."""
        return [(number, target) for number, line in self.prose for target in _LINK.findall(line)]

    @cached_property
    def code_spans(self) -> list[tuple[int, str]]:
        """Line numbers and texts of all code spans."""
        return [(number, span) for number, line in self.prose for span in _CODE_SPAN.findall(line)]

    def broken_links(self) -> list[str]:
        """List the relative links whose file or anchor does not exist."""
        broken = []
        for number, target in self.links:
            if re.match(r"[a-z]+:", target):
                continue
            path, _, anchor = target.partition("#")
            file = (self.root / self.name).parent / path if path else self.root / self.name
            relative = file.resolve().relative_to(self.root.resolve()).as_posix()
            if not file.exists():
                broken.append(f"{self.name}:{number}: {target}: file not found")
            elif anchor and anchor not in Page(self.root, relative).anchors:
                broken.append(f"{self.name}:{number}: {target}: no such heading")
        return broken


def pages(root: Path) -> list[Page]:
    """Return the pages whose commands are tested: the README and all of docs/ and docker/."""
    names = ["README.md", "docker/README.md"]
    names += sorted(path.relative_to(root).as_posix() for path in (root / "docs").rglob("*.md"))
    return [Page(root, name) for name in names]


def linked_pages(root: Path) -> list[Page]:
    """Return all pages whose links are tested."""
    notes = sorted((root / "benchmarks" / "notes").glob("*.md"))
    more = ["CHANGELOG.md", *(note.relative_to(root).as_posix() for note in notes)]
    return [*pages(root), *(Page(root, name) for name in more)]


def _anchor(heading: str) -> str:
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading.replace("`", "")).lower().strip()
    return re.sub(r"[^\w\- ]", "", text).replace(" ", "-")
