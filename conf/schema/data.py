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
    Null: `path` is a path on this machine."""
    text_field: str = "text"
    """Field or column with the text, in JSONL, JSON and Parquet files and in datasets."""
    tokens: int = 400_000
    """Rows to store per hookpoint. Rounded up to whole contexts; if the text is shorter, all of it
    is stored."""
    context_tokens: int = 128
    """Tokens in a context, BOS included."""
    heldout_fraction: float = 0.05
    """Fraction of the documents that is held out of the store for evaluation. A hash of its text
    decides for each document."""
    drop_special_tokens: bool = True
    """Do not store the rows of BOS, EOS and padding tokens. Position 0 of a context, an attention
    sink, is never stored."""

    def validate(self) -> None:
        """Validate all fields.

        Raises:
            ConfigError: If a field is invalid; the error names it.
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
