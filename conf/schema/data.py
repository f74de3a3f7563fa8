"""Settings of the text."""

from __future__ import annotations

from dataclasses import dataclass

from foundation.errors import ConfigError


@dataclass
class DataConfig:
    """The text, and how it is split into contexts of tokens."""

    path: str = ""
    """A text, JSONL, JSON or Parquet file, a folder of such files, or a saved Hugging Face
    dataset."""
    package: str | None = None
    """An installed Python package that contains the text; `path` is then relative to the package.
    If null, `path` is a path on this machine."""
    text_field: str = "text"
    """Field or column with the text, in JSONL, JSON and Parquet files and in datasets."""
    tokens: int = 400_000
    """Number of rows to store per hookpoint, rounded up to whole contexts. If the text has fewer,
    all of its rows are stored."""
    context_tokens: int = 128
    """Number of tokens in a context, including BOS."""
    heldout_fraction: float = 0.05
    """Fraction of the documents that is kept out of the store and used for evaluation. A hash of a
    document's text determines whether the document is held out."""
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
