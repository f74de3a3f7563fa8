"""Rules for holding out a part of a text for evaluation."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

from cluster.language_model.text_formats import Document
from conf.schema.data import DataConfig


def is_heldout(document: Document, fraction: float) -> bool:
    """Return True if a document belongs to the held-out split.

    The decision depends only on its content, so copies of a document are in the same split.
    """
    content = document.encode() if isinstance(document, str) else document.tobytes()
    head = hashlib.sha256(content).digest()[:8]
    return int.from_bytes(head, "big") < fraction * 2**64


def parts_of_splits(
    document: Document, n_tokens: int, data: DataConfig
) -> Iterator[tuple[str, int, int]]:
    """Yield the parts of a document that belong to the splits, by the rule `data.heldout`.

    Args:
        document: The document.
        n_tokens: Number of its tokens.
        data: Settings of the text.

    Yields:
        The split, train or heldout, and the first and last plus one of its tokens.
    """
    if data.heldout == "none":
        yield "train", 0, n_tokens
    elif data.heldout == "documents":
        split = "heldout" if is_heldout(document, data.heldout_fraction) else "train"
        yield split, 0, n_tokens
    else:
        stop = n_tokens - round(data.heldout_fraction * n_tokens)
        if stop:
            yield "train", 0, stop
        if stop < n_tokens:
            yield "heldout", stop, n_tokens
