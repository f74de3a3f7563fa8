"""The tokens that begin contexts and separate documents, and special tokens written in a text."""

from __future__ import annotations

import re
from typing import Any

from cluster.language_model.errors import TextError
from cluster.language_model.no_tokenizer import NoTokenizer
from conf.schema.data import DataConfig
from foundation.errors import ConfigError

_END_OF_TEXT = "<|endoftext|>"


def boundary_ids(tokenizer: Any, data: DataConfig) -> tuple[int, int]:
    """Return the id of the token that begins a context and of the one that separates documents.

    `data.bos_token` and `data.separator_token` name them. Otherwise a context begins with the token
    that the tokenizer itself puts before a text, or else with its BOS token, and EOS separates
    documents (in encoders CLS and SEP). If one of them is missing, the other is used for both.

    Chat models may declare their turn markers as BOS and EOS, although they were pre-trained with
    `<|endoftext|>`. That token is therefore used in place of one that occurs in the chat template.

    Raises:
        ConfigError: If a named token is not in the vocabulary.
        TextError: If the tokenizer has none of these tokens.
    """
    bos_id = _named(tokenizer, "data.bos_token", data.bos_token)
    separator_id = _named(tokenizer, "data.separator_token", data.separator_token)
    if isinstance(tokenizer, NoTokenizer):
        bos_id, separator_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    elif bos_id is None:
        bos_id = _prepended(tokenizer)
    if bos_id is None:
        bos_id = _own(tokenizer, "bos_token", "cls_token")
    if separator_id is None:
        separator_id = _own(tokenizer, "eos_token", "sep_token")
    if bos_id is None and separator_id is None:
        if isinstance(tokenizer, NoTokenizer):
            raise TextError(
                "the model has no tokenizer, and its config.json has neither bos_token_id nor "
                "eos_token_id; add one of them there: it begins every context"
            )
        raise TextError(
            "the tokenizer has neither a BOS nor an EOS token; name tokens of its vocabulary with "
            "data.bos_token and data.separator_token"
        )
    # One of them is not None, which mypy cannot know.
    return (
        int(separator_id if bos_id is None else bos_id),  # type: ignore[arg-type]
        int(bos_id if separator_id is None else separator_id),  # type: ignore[arg-type]
    )


def excluded_ids(tokenizer: Any, data: DataConfig) -> tuple[int, ...]:
    """Return the ids of `data.exclude_tokens` and `data.exclude_ids`, ascending.

    A token is named as in the vocabulary, or by its text.

    Raises:
        ConfigError: If a text is not a single token.
    """
    ids = set(data.exclude_ids)
    vocabulary = tokenizer.get_vocab() if data.exclude_tokens else {}
    for token in data.exclude_tokens:
        found = [vocabulary[token]] if token in vocabulary else []
        if not found and vocabulary:
            found = tokenizer(token, add_special_tokens=False)["input_ids"]
        if len(found) != 1:
            names = tokenizer.convert_ids_to_tokens(found) if found else "no tokens"
            raise ConfigError(
                "data.exclude_tokens",
                token,
                f"one token of the model's vocabulary, found {names}",
                "name each token, or set data.exclude_ids",
            )
        ids.add(int(found[0]))
    return tuple(sorted(ids))


def special_strings(tokenizer: Any) -> re.Pattern[str] | None:
    """Return a pattern of the special tokens as they may be written in a text."""
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    names = {str(token) for token in added if token.special} | set(tokenizer.all_special_tokens)
    ordered = sorted(names, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, ordered))) if ordered else None


def _named(tokenizer: Any, key: str, token: str | None) -> int | None:
    if token is None:
        return None
    if isinstance(tokenizer, NoTokenizer):
        raise ConfigError(key, token, "null, because the model has no tokenizer to look it up in")
    vocabulary = tokenizer.get_vocab()
    if token not in vocabulary:
        known = tokenizer.all_special_tokens[:4] or sorted(vocabulary)[:4]
        raise ConfigError(
            key, token, "a token of the model's vocabulary", f"use one such as {', '.join(known)}"
        )
    return int(vocabulary[token])


def _prepended(tokenizer: Any) -> int | None:
    """Return the token that the tokenizer puts before a text, or None."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    if len(whole) > len(plain) and whole[: len(plain)] != plain:
        return int(whole[0])
    return None


def _own(tokenizer: Any, *names: str) -> int | None:
    """Return the first declared token, or `<|endoftext|>` if that is a mark of a chat's turns."""
    for name in names:
        token = getattr(tokenizer, name, None)
        if token is None:
            continue
        vocabulary = tokenizer.get_vocab()
        if _END_OF_TEXT in vocabulary and str(token) in str(tokenizer.chat_template or ""):
            token = _END_OF_TEXT
        return int(vocabulary[str(token)])
    return None
