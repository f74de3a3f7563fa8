"""Encoders: turn documents of each kind into tokens."""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cluster.language_model.errors import TextError
from cluster.language_model.text_formats import Document
from cluster.language_model.tokens.boundaries import special_strings
from cluster.language_model.tokens.long_documents import encode_documents
from conf.schema.data import DataConfig


class Encoded(NamedTuple):
    """The tokens of a document."""

    ids: NDArray[np.int32]
    """Token ids, [n]."""
    counts: NDArray[np.bool_] | None = None
    """True for the tokens whose rows may be stored, [n]; None means all."""


class Encoder(ABC):
    """Tokenises documents of one kind."""

    n_special = 0
    """Number of special tokens that were found written in documents so far."""

    @abstractmethod
    def encode(self, documents: Sequence[Document]) -> list[Encoded]:
        """Return the tokens of each document.

        Raises:
            TextError: If a document cannot be encoded.
        """


class TextEncoder(Encoder):
    """Tokenises text. Special tokens written in a document are treated as text and counted."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._specials = special_strings(tokenizer)

    def encode(self, documents: Sequence[Document]) -> list[Encoded]:
        """Return the tokens of each text."""
        texts = [str(document) for document in documents]
        if self._specials is not None:
            self.n_special += sum(len(self._specials.findall(text)) for text in texts)
        found = encode_documents(self._tokenizer, texts, split_special_tokens=True)
        return [Encoded(np.asarray(ids, np.int32)) for ids in found]


class IdsEncoder(Encoder):
    """Takes token ids as they are."""

    def encode(self, documents: Sequence[Document]) -> list[Encoded]:
        """Return the ids of each document."""
        return [Encoded(np.asarray(ids, np.int32)) for ids in documents]


class ChatEncoder(Encoder):
    """Puts messages into the tokenizer's chat template.

    Special tokens that are written in a message become real ones, as in the libraries that models
    are run with; they are counted.

    Args:
        tokenizer: A fast tokenizer with a chat template.
        roles: Roles whose messages count; empty means all tokens.

    Raises:
        TextError: If the tokenizer has no chat template.
    """

    def __init__(self, tokenizer: Any, roles: Sequence[str] = ()) -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise TextError(
                "data.kind=chat: the model's tokenizer has no chat template; use a model that was "
                "trained on chats, or data.kind=text with the field of one text"
            )
        self._tokenizer = tokenizer
        self._roles = frozenset(roles)
        self._specials = special_strings(tokenizer)

    def encode(self, documents: Sequence[Document]) -> list[Encoded]:
        """Return the tokens of each chat, in the model's template."""
        return [self._chat(json.loads(str(document))) for document in documents]

    def _chat(self, messages: list[dict[str, str]]) -> Encoded:
        if self._specials is not None:
            contents = (message["content"] for message in messages)
            self.n_special += sum(len(self._specials.findall(text)) for text in contents)
        text = self._rendered(messages)
        found = self._tokenizer(
            text,
            add_special_tokens=False,
            return_offsets_mapping=bool(self._roles),
            return_attention_mask=False,
            verbose=False,
        )
        ids = np.asarray(found["input_ids"], np.int32)
        if not self._roles:
            return Encoded(ids)
        first = np.array(found["offset_mapping"], np.int64).reshape(-1, 2)[:, 0]
        counts = np.zeros(len(ids), np.bool_)
        for start, stop in self._spans(messages, text):
            counts |= (first >= start) & (first < stop)
        return Encoded(ids, counts)

    def _spans(self, messages: list[dict[str, str]], text: str) -> list[tuple[int, int]]:
        """Return the first and last plus one character of each message that counts.

        A message is its content and the special token that directly follows, which ends a turn.
        Markers in place of the contents show where the template puts them.

        Raises:
            TextError: If the template does more with contents than to strip spaces around them.
        """
        marks = [f"\ue000{number}\ue001" for number in range(len(messages))]
        marked = [{**one, "content": mark} for one, mark in zip(messages, marks, strict=True)]
        rest = self._rendered(marked)
        spans = []
        end = 0
        for message, mark in zip(messages, marks, strict=True):
            before, _, rest = rest.partition(mark)
            start = end + len(before)
            following = re.split("\ue000", rest, maxsplit=1)[0]
            content = message["content"]
            variants = (content, content.strip(), content.lstrip(), content.rstrip())
            found = [one for one in variants if text.startswith(one + following, start)]
            if not text.startswith(before, end) or not found:
                raise TextError(
                    f"data.roles={sorted(self._roles)}: the chat template changes the message "
                    f"{content[:60]!r}, so its tokens cannot be located; set data.roles=[] to "
                    "store all tokens"
                )
            end = start + len(found[0])
            if message["role"] in self._roles:
                mark_of_end = self._specials and self._specials.match(text, end)
                spans.append((start, mark_of_end.end() if mark_of_end else end))
        return spans

    def _rendered(self, messages: list[dict[str, str]]) -> str:
        try:
            text: str = self._tokenizer.apply_chat_template(messages, tokenize=False)
        except Exception as error:  # a template may raise any exception
            roles = [message["role"] for message in messages]
            raise TextError(
                f"data.kind=chat: the model's chat template refuses messages of the roles {roles}: "
                f"{str(error)[:200]}"
            ) from error
        return text


def encoder_of(data: DataConfig, tokenizer: Any) -> Encoder:
    """Return the encoder of `data.kind`.

    Raises:
        TextError: If the tokenizer does not suit the kind.
    """
    if data.kind == "token_ids":
        return IdsEncoder()
    if data.kind == "chat":
        return ChatEncoder(tokenizer, data.roles)
    return TextEncoder(tokenizer)
