"""Write the tokens of a text's splits as streams, one file for each column.

`data.packing` says how documents fill a stream: joined, with a separator after each document;
masked, with BOS before each as well; or separate, cut into contexts with padding.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cluster.language_model.text_formats import Document
from cluster.language_model.tokens.encoders import Encoded, Encoder
from cluster.language_model.tokens.heldout import parts_of_splits
from conf.schema.data import DataConfig

SPLITS = ("train", "heldout")
COUNTS = "counts"
COLUMNS: dict[str, np.dtype[Any]] = {
    "token_id": np.dtype("<i4"),
    "document": np.dtype("<i8"),
    "position": np.dtype("<i4"),
    COUNTS: np.dtype(np.bool_),
}
"""Columns of a stream. `counts` exists only if some tokens do not count (`Encoded.counts`)."""
NO_TOKEN = -1
"""Position of padding, and of the BOS token of a document inside a context."""
BATCH_LENGTH = 4_000_000
"""Number of characters, or of token ids, that are encoded in one call. It bounds memory use."""


def write_streams(
    documents: Iterator[Document],
    encoder: Encoder,
    boundaries: tuple[int, int],
    data: DataConfig,
    target: Path,
) -> dict[str, Any]:
    """Write the streams of both splits.

    Args:
        documents: The documents of the text.
        encoder: Encoder of the documents.
        boundaries: Ids of BOS and of the separator.
        data: Settings of the text.
        target: Folder to write to.

    Returns:
        The number of tokens and documents of each split, of all documents, of special tokens that
        are written in documents, and of positions without a token of a document.
    """
    columns = list(COLUMNS) if data.roles else [name for name in COLUMNS if name != COUNTS]
    counts = dict.fromkeys(SPLITS, 0)
    documents_of = dict.fromkeys(SPLITS, 0)
    n_documents = n_padding = 0
    with ExitStack() as stack:
        files = {
            (split, column): stack.enter_context((target / f"{split}.{column}.bin").open("wb"))
            for split in SPLITS
            for column in columns
        }
        for batch in _batches(documents):
            for document, encoded in zip(batch, encoder.encode(batch), strict=True):
                for split, start, stop in parts_of_splits(document, len(encoded.ids), data):
                    part = _packed(encoded, start, stop, boundaries, data)
                    part["document"] = np.full(len(part["token_id"]), n_documents)
                    for column in columns:
                        values = part[column].astype(COLUMNS[column], copy=False)
                        files[split, column].write(np.ascontiguousarray(values).data)
                    n_tokens = int((part["position"] != NO_TOKEN).sum())
                    counts[split] += n_tokens
                    n_padding += len(part["token_id"]) - n_tokens
                    documents_of[split] += 1
                n_documents += 1
    return {
        "tokens": counts,
        "documents": documents_of,
        "n_documents": n_documents,
        "special_strings": encoder.n_special,
        "no_token": n_padding,
    }


def _packed(
    encoded: Encoded, start: int, stop: int, boundaries: tuple[int, int], data: DataConfig
) -> dict[str, NDArray[Any]]:
    """Return the columns of a part of a document in its stream.

    Args:
        encoded: The document.
        start: First token of the part.
        stop: Last token of the part plus one.
        boundaries: Ids of BOS and of the separator.
        data: Settings of the text.
    """
    bos_id, separator_id = boundaries
    ids, positions = encoded.ids[start:stop], np.arange(start, stop)
    counts = np.ones(len(encoded.ids), np.bool_) if encoded.counts is None else encoded.counts
    counts = counts[start:stop]
    # Token ids and templates may already contain the tokens that mark a document.
    if data.packing != "joined" and len(ids) and ids[0] == bos_id:
        ids, positions, counts = ids[1:], positions[1:], counts[1:]
    ends = len(ids) and ids[-1] == separator_id and data.kind != "text"
    before: list[int] = [bos_id] if data.packing == "masked" else []
    after: list[int] = [] if ends or data.packing == "separate" else [separator_id]
    padding = 0
    if data.packing == "separate":
        padding = -len(ids) % (data.context_tokens - 1)
    return {
        "token_id": np.concatenate([before, ids, after, [separator_id] * padding]),
        "position": np.concatenate(
            [[NO_TOKEN] * len(before), positions, [stop] * len(after), [NO_TOKEN] * padding]
        ),
        COUNTS: np.concatenate(
            [[False] * len(before), counts, [not data.roles] * len(after), [False] * padding]
        ),
    }


def _batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    length = 0
    for document in documents:
        batch.append(document)
        length += len(document)
        if length >= BATCH_LENGTH:
            yield batch
            batch = []
            length = 0
    if batch:
        yield batch
