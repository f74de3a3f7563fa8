"""Settings of the text."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from foundation.errors import ConfigError

HELDOUT_RULES = ("documents", "tokens", "none")
FIELDS = {"text": "text", "token_ids": "input_ids", "chat": "messages"}
"""Kinds of documents, and the fields that hold them by default."""
PACKINGS = ("joined", "masked", "separate")


@dataclass
class MixedText:
    """Another text in a mixture."""

    path: str = ""
    """Its path, as `data.path`."""
    weight: float = 1.0
    """Share of this text, relative to `data.weight` and to the weights of the other texts."""
    package: str | None = None
    """Its package, as `data.package`."""
    text_field: str | None = None
    """Its field or column with the text; null means `data.text_field`."""
    files: str | None = None
    """As `data.files`."""
    subset: str | None = None
    """As `data.subset`."""
    split: str | None = None
    """As `data.split`."""
    revision: str | None = None
    """As `data.revision`."""


@dataclass
class DataConfig:
    """The text, and how it is split into contexts of tokens."""

    path: str = ""
    """A file of text, JSON, CSV, Parquet or Arrow, a folder of such files, a saved Hugging Face
    dataset, or the name of a data set on the Hugging Face Hub, such as `org/name`."""
    package: str | None = None
    """An installed Python package that contains the text; `path` is then relative to the package.
    If null, `path` is a path on this machine."""
    kind: str = "text"
    """What a document is. text: text; token_ids: a list of ids of the model's vocabulary; chat: a
    list of messages `{role, content}`, which go through the model's chat template."""
    text_field: str | None = None
    """Field or column with the documents, in formats that have fields. Null means text, input_ids
    or messages, as `kind` says. Dots select nested fields: `meta.text`. For one JSON object
    whose values are the documents, `'*'`."""
    roles: list[str] = field(default_factory=list)
    """Roles whose messages are stored if `kind=chat`, such as `[assistant]`. Empty means all
    tokens, those of the template included. Other tokens are still read by the model."""
    encoding: str = "utf-8"
    """Character encoding of text, JSON and CSV files, such as cp1252 or utf-16."""
    files: str | None = None
    """Pattern of the files of a folder to read, such as `'en/*.parquet'`; `*` also matches
    slashes. Null means all files that hold documents."""
    subset: str | None = None
    """Subset (configuration) of a data set on the Hub, or a folder inside `path`."""
    split: str | None = None
    """Split of a data set on the Hub or in a folder. Null means train, or all files of a folder
    without splits; all means all splits."""
    revision: str | None = None
    """Commit, branch or tag of a data set on the Hub. Null means its default branch."""
    streaming: bool = False
    """Read a data set on the Hub over the network while it is tokenised, instead of downloading it
    first. Needs `max_documents`."""
    max_documents: int | None = None
    """Use only this many documents, the first ones; null means all."""
    mixture: list[MixedText] = field(default_factory=list)
    """Other texts `{path: ..., weight: ...}` to mix with the one at `path`, document by document,
    so that their shares of the characters are in proportion to the weights. The mixture ends when
    the first of its texts runs out."""
    weight: float = 1.0
    """Share of the text at `path` in a mixture, relative to the weights of the other texts."""
    tokens: int = 400_000
    """Number of rows to store per hookpoint, rounded up to whole contexts. If the text has fewer,
    all of its rows are stored."""
    context_tokens: int = 128
    """Number of tokens in a context, including BOS."""
    bos_token: str | None = None
    """Token that begins every context. Null means the one that the tokenizer puts before a text, or
    its BOS token."""
    separator_token: str | None = None
    """Token that follows every document. Null means the tokenizer's EOS token."""
    packing: str = "joined"
    """How documents fill contexts. joined: one after another, and tokens see the documents before
    theirs; masked: likewise, but every document begins with BOS and sees only itself; separate:
    each document has its own contexts, with padding."""
    first_position: int = 1
    """First position of a context whose row is stored. Position 0 never is, because it is an
    attention sink."""
    last_position: int | None = None
    """Last position of a context whose row is stored; null means all."""
    exclude_tokens: list[str] = field(default_factory=list)
    """Tokens whose rows are not stored, such as `["\\n"]`."""
    exclude_ids: list[int] = field(default_factory=list)
    """Ids of tokens whose rows are not stored."""
    heldout_fraction: float = 0.05
    """Fraction of the documents that is kept out of the store and used for evaluation. A hash of a
    document's text determines whether the document is held out."""
    heldout: str = "documents"
    """What is held out. documents: whole documents; tokens: the last part of each document, for
    texts of one or few documents; none: nothing, so that evaluation uses stored rows."""
    max_norm_multiple: float | None = 10.0
    """Do not store rows whose norm at any hookpoint is more than this multiple of the median norm
    in the first work item. A few such rows would hold much of the variance. Null stores all."""
    drop_special_tokens: bool = True
    """Do not store the rows of BOS, EOS and padding tokens."""

    @property
    def field(self) -> str:
        """Field or column with the documents."""
        return self.text_field or FIELDS[self.kind]

    def validate(self) -> None:
        """Validate all fields.

        Raises:
            ConfigError: If a field is invalid. The message names the field.
        """
        if not self.path:
            raise ConfigError("data.path", self.path, "a file or a folder of text", "set data.path")
        self._validate_text()
        if self.tokens < 1:
            raise ConfigError("data.tokens", self.tokens, "at least 1")
        if self.context_tokens < 2:
            raise ConfigError(
                "data.context_tokens",
                self.context_tokens,
                "at least 2, because position 0 is never stored",
            )
        if not 0 < self.heldout_fraction < 1:
            raise ConfigError(
                "data.heldout_fraction",
                self.heldout_fraction,
                "a fraction between 0 and 1, exclusive",
            )
        if self.max_norm_multiple is not None and self.max_norm_multiple <= 1:
            raise ConfigError(
                "data.max_norm_multiple",
                self.max_norm_multiple,
                "more than 1, or null for no limit",
            )
        if self.heldout not in HELDOUT_RULES:
            raise ConfigError("data.heldout", self.heldout, f"one of: {', '.join(HELDOUT_RULES)}")
        self._validate_rows()

    def _validate_rows(self) -> None:
        """Validate the fields that say how contexts are made and which rows are stored."""
        for key, value, allowed in (
            ("data.kind", self.kind, tuple(FIELDS)),
            ("data.packing", self.packing, PACKINGS),
        ):
            if value not in allowed:
                raise ConfigError(key, value, f"one of: {', '.join(allowed)}")
        if self.roles and self.kind != "chat":
            raise ConfigError("data.roles", self.roles, "[] unless data.kind=chat")
        last = self.context_tokens - 1
        if not 1 <= self.first_position <= last:
            raise ConfigError(
                "data.first_position",
                self.first_position,
                f"1 to {last}, the last position of data.context_tokens={self.context_tokens}",
            )
        if self.last_position is not None and not self.first_position <= self.last_position <= last:
            raise ConfigError(
                "data.last_position",
                self.last_position,
                f"null, or data.first_position={self.first_position} to {last}",
            )
        if any(one < 0 for one in self.exclude_ids):
            raise ConfigError("data.exclude_ids", self.exclude_ids, "ids of 0 or more")

    def _validate_text(self) -> None:
        """Validate the fields that name the text and say how it is read."""
        try:
            "".encode(self.encoding)
        except LookupError:
            raise ConfigError(
                "data.encoding",
                self.encoding,
                "a character encoding that Python knows, such as utf-8, utf-16 or cp1252",
            ) from None
        if self.max_documents is not None and self.max_documents < 1:
            raise ConfigError("data.max_documents", self.max_documents, "at least 1, or null")
        if self.streaming and self.max_documents is None:
            raise ConfigError(
                "data.streaming",
                self.streaming,
                "data.max_documents as well, because otherwise the whole data set is read",
                "set data.max_documents",
            )
        weights = {f"data.mixture[{i}].weight": one.weight for i, one in enumerate(self.mixture)}
        for key, weight in {"data.weight": self.weight, **weights}.items():
            if not (math.isfinite(weight) and weight > 0):
                raise ConfigError(key, weight, "a finite number above 0")
        if not self.mixture and self.weight != 1:
            raise ConfigError(
                "data.weight", self.weight, "1 without data.mixture", "set data.mixture"
            )
        parts: list[DataConfig | MixedText] = [self, *self.mixture]
        texts = [(one.path, one.package, one.files, one.subset, one.split) for one in parts]
        if not all(path for path, *_ in texts):
            raise ConfigError(
                "data.mixture", self.mixture, "a path in every entry {path: ..., weight: ...}"
            )
        if len(set(texts)) < len(texts):
            raise ConfigError(
                "data.mixture",
                [path for path, *_ in texts],
                "different texts",
                "to read more of a text, give it a larger weight",
            )
