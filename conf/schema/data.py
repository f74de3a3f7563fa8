"""Settings of the text."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from foundation.errors import ConfigError

HELDOUT_RULES = ("documents", "tokens", "none")


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
    text_field: str = "text"
    """Field or column with the text, in formats that have fields. Dots lead into nested fields:
    `meta.text`. For one JSON object whose values are the documents, `'*'`."""
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
    so that their shares of the characters are in proportion to the weights. The mixture ends with
    the text that ends first."""
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
    """Do not store the rows of BOS, EOS and padding tokens. Position 0 of a context is never
    stored, because it is an attention sink."""

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
                "data.max_documents beside it, because otherwise the whole data set is read",
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
