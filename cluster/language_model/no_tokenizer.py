"""Replacement for the tokenizer of a model that has none and is given token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar


class NoTokenizer:
    """The ids of special tokens from a model's configuration, without token names.

    It has those attributes of a transformers tokenizer that concern ids.

    Args:
        config: The model's transformers configuration.
    """

    chat_template = None
    is_fast = False
    all_special_tokens: ClassVar[list[str]] = []
    special_tokens_map: ClassVar[Mapping[str, str]] = {}

    def __init__(self, config: Any) -> None:
        text = config.get_text_config()
        self.bos_token_id = _first(getattr(text, "bos_token_id", None))
        self.eos_token_id = _first(getattr(text, "eos_token_id", None))
        self.pad_token_id = _first(getattr(text, "pad_token_id", None))

    def get_vocab(self) -> dict[str, int]:
        """Return no tokens."""
        return {}

    def decode(self, ids: Sequence[int]) -> str:
        """Return the ids as text."""
        return " ".join(map(str, ids))

    def convert_ids_to_tokens(self, one: int) -> str:
        """Return the id as text."""
        return str(one)


def _first(value: Any) -> int | None:
    """Return an id, or the first of a list of ids."""
    if isinstance(value, list | tuple):
        value = value[0] if value else None
    return None if value is None else int(value)
