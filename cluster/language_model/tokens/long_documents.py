"""Tokenise documents of any length in bounded memory.

A tokenizer needs more than 100 bytes for each character of its input. A long document is therefore
tokenised in pieces that overlap. Two pieces are joined where both give the same tokens over a
stretch far enough from the cuts, because a token depends only on the text near it. The result is
that of the whole document; where the pieces do not agree, the overlap is enlarged, up to the whole
document.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

PIECE_CHARACTERS = 1_000_000
"""Number of characters that are tokenised at once."""
OVERLAP_CHARACTERS = 4_000
"""Number of characters by which two pieces overlap at first."""
AGREEING_TOKENS = 32
"""Number of equal tokens at which two pieces are joined."""


class Tokens(NamedTuple):
    """Tokens of a piece of a text."""

    ids: NDArray[np.int32]
    """Token ids, [n]."""
    spans: NDArray[np.int64]
    """First character of each token in the whole text, and the one after its last, [n, 2]."""


Ids = Sequence[int] | NDArray[np.int32]
"""Token ids of a document, [n]."""
Encode = Callable[[str, int], Tokens]
"""Function that tokenises a text which begins at the given character of the document."""


def encode_documents(tokenizer: Any, texts: list[str], **options: Any) -> list[Ids]:
    """Return the token ids of each text, without special tokens at its ends.

    Args:
        tokenizer: A tokenizer of transformers. One that is not fast has no character spans, and
            gets long documents as a whole.
        texts: The texts.
        options: Further arguments of the tokenizer.
    """
    options = {
        "add_special_tokens": False,
        "return_attention_mask": False,
        "verbose": False,
        **options,
    }

    def encode(text: str, start: int) -> Tokens:
        found = tokenizer(text, return_offsets_mapping=True, **options)
        spans = np.array(found["offset_mapping"], np.int64).reshape(-1, 2) + start
        return Tokens(np.array(found["input_ids"], np.int32), spans)

    is_long = [len(text) > PIECE_CHARACTERS and tokenizer.is_fast for text in texts]
    short = [text for text, long in zip(texts, is_long, strict=True) if not long]
    encoded = iter(tokenizer(short, **options)["input_ids"] if short else [])
    return [
        encode_in_pieces(encode, text) if long else next(encoded)
        for text, long in zip(texts, is_long, strict=True)
    ]


def encode_in_pieces(encode: Encode, text: str) -> NDArray[np.int32]:
    """Return the token ids of a text [n], which is tokenised in pieces."""
    stop = PIECE_CHARACTERS
    tokens = encode(text[:stop], 0)
    parts: list[NDArray[np.int32]] = []
    while stop < len(text):
        overlap = OVERLAP_CHARACTERS
        while True:
            start = max(0, stop - overlap)
            next_stop = stop + PIECE_CHARACTERS
            following = encode(text[start:next_stop], start)
            join = _join(tokens, following, start, stop)
            if join is not None:
                parts.append(tokens.ids[: join[0]])
                tokens = Tokens(following.ids[join[1] :], following.spans[join[1] :])
                break
            if start == 0 or overlap >= PIECE_CHARACTERS:
                return encode(text, 0).ids
            overlap *= 8
        stop = next_stop
    return np.concatenate([*parts, tokens.ids])


def _join(left: Tokens, right: Tokens, start: int, stop: int) -> tuple[int, int] | None:
    """Return where to leave the left and enter the right piece, or None if they do not agree.

    Args:
        left: Tokens of a piece that ends at the character `stop`.
        right: Tokens of the next piece, which begins at the character `start`.
        start: First character of the overlap.
        stop: Character after its last.
    """
    middle = (start + stop) // 2
    first_left = int(np.searchsorted(left.spans[:, 0], middle))
    first_right = int(np.searchsorted(right.spans[:, 0], middle))
    # The tokens of one character that has several bytes begin at the same place in both.
    ids = [
        one.ids[i : i + AGREEING_TOKENS] for one, i in ((left, first_left), (right, first_right))
    ]
    spans = [
        one.spans[i : i + AGREEING_TOKENS] for one, i in ((left, first_left), (right, first_right))
    ]
    agree = (
        len(ids[0]) == len(ids[1]) == AGREEING_TOKENS
        and np.array_equal(ids[0], ids[1])
        and np.array_equal(spans[0], spans[1])
        # The last quarter of the overlap may differ, because the left piece ends there.
        and spans[0][-1, 1] <= stop - (stop - start) // 4
    )
    return (first_left, first_right) if agree else None
