"""Contexts of tokens: documents are split by a hash of their text, tokenised, joined and cut.

The stream of a split is its documents, each followed by a separator token. A context is the BOS
token and the next `context_tokens - 1` tokens of the stream; what remains at the end is left out.
The streams are kept in the cache as plain memory-mapped files, so every process that needs them
opens the same pages.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cluster.cache import built_once, digest
from cluster.config import DataConfig
from cluster.errors import TextError
from cluster.models import tokenizer_sha256
from cluster.texts import find_text

SCHEMA = 1
SPLITS = ("train", "heldout")
COLUMNS: dict[str, np.dtype[Any]] = {
    "token_id": np.dtype("<i4"),
    "document": np.dtype("<i8"),
    "position": np.dtype("<i4"),
}
BATCH_CHARACTERS = 4_000_000
"""Text handed to the tokenizer at once; bounds memory."""
PLAN_CONTEXTS = 4096
"""Contexts whose rows are counted at once; bounds memory."""


@dataclass(frozen=True)
class Split:
    """Contexts of one split; C contexts of T tokens, BOS included but not kept in the files."""

    token_id: NDArray[np.int32]
    """[C, T-1]"""
    document: NDArray[np.int64]
    """[C, T-1] number of the document among all documents of the text."""
    position: NDArray[np.int32]
    """[C, T-1] index of the token within its document."""
    bos_id: int
    dropped_ids: tuple[int, ...]
    """Tokens whose rows are not stored."""

    def __len__(self) -> int:
        return len(self.token_id)

    def input_ids(self, contexts: NDArray[np.int64]) -> NDArray[np.int64]:
        """[n, T] what the model reads, BOS first, for the contexts of these numbers."""
        tokens = self.token_id[contexts].astype(np.int64)
        return np.pad(tokens, ((0, 0), (1, 0)), constant_values=self.bos_id)

    def kept(self, contexts: NDArray[np.int64]) -> NDArray[np.bool_]:
        """[n, T-1] which rows are stored; position 0 of a context never is, and has no column."""
        return np.isin(self.token_id[contexts], self.dropped_ids, invert=True)


@dataclass(frozen=True)
class Contexts:
    """Both splits of a text under one tokenizer."""

    folder: Path
    context_tokens: int
    n_documents: int
    bos_id: int
    separator_id: int
    train: Split
    heldout: Split


@dataclass(frozen=True)
class ItemPlan:
    """Which contexts each work item holds: a pure function of (text, tokenizer, data, seed)."""

    order: NDArray[np.int64]
    """[contexts] numbers of the training contexts that are stored, in the order of the items."""
    contexts_per_item: int
    n_rows: int
    """Rows stored in all, dropped ones not counted."""

    @property
    def n_items(self) -> int:
        """Work items; the last one may hold fewer contexts."""
        return -(-len(self.order) // self.contexts_per_item)

    def contexts(self, item: int) -> NDArray[np.int64]:
        """[contexts_per_item] or fewer: the contexts of a work item."""
        return self.order[item * self.contexts_per_item : (item + 1) * self.contexts_per_item]


def prepare_contexts(data: DataConfig, tokenizer: Any, cache_dir: Path) -> Contexts:
    """Tokenises the text into the cache, once, and opens it.

    Raises:
        TextError: The text cannot be read, or the tokenizer has no token that can begin a context.
    """
    source = find_text(data)
    bos_id, separator_id = boundary_ids(tokenizer)
    key = {
        "schema": SCHEMA,
        "text": source.sha256(cache_dir),
        "tokenizer": tokenizer_sha256(tokenizer),
        "context_tokens": data.context_tokens,
        "heldout_fraction": data.heldout_fraction,
        "separator_id": separator_id,
    }

    def build(target: Path) -> None:
        documents = source.documents()
        meta = _write_streams(documents, tokenizer, separator_id, data.heldout_fraction, target)
        (target / "meta.json").write_text(json.dumps({**key, **meta}))

    folder = built_once(cache_dir / "contexts" / digest(key), build)
    meta = json.loads((folder / "meta.json").read_text())
    dropped: tuple[int, ...] = ()
    if data.drop_special_tokens:
        known = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
        dropped = tuple(sorted({bos_id, separator_id, *(i for i in known if i is not None)}))
    train, heldout = (
        _open_split(folder, name, data.context_tokens, bos_id, dropped) for name in SPLITS
    )
    n_documents = int(meta["n_documents"])
    return Contexts(folder, data.context_tokens, n_documents, bos_id, separator_id, train, heldout)


def boundary_ids(tokenizer: Any) -> tuple[int, int]:
    """The token that begins a context, and the one that separates documents.

    `<|endoftext|>` is both where the vocabulary has it: models of that family were pre-trained so,
    and their chat versions name other tokens as BOS and EOS. Otherwise BOS and EOS, each standing
    in for the other where one is missing.

    Raises:
        TextError: The tokenizer has none of them.
    """
    end_of_text = tokenizer.get_vocab().get("<|endoftext|>")
    if end_of_text is not None:
        return int(end_of_text), int(end_of_text)
    bos_id, eos_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    if bos_id is None and eos_id is None:
        raise TextError("the tokenizer has neither a BOS nor an EOS token; give it one and save it")
    return int(eos_id if bos_id is None else bos_id), int(bos_id if eos_id is None else eos_id)


def is_heldout(text: str, fraction: float) -> bool:
    """Decides a document's split from its text alone: copies of a document land together."""
    head = hashlib.sha256(text.encode()).digest()[:8]
    return int.from_bytes(head, "big") < fraction * 2**64


def plan_items(split: Split, seed: int, tokens: int, shard_tokens: int) -> ItemPlan:
    """Takes contexts in a seeded random order until `tokens` rows are reached, or all of them.

    Args:
        split: The training contexts.
        seed: Seed of the run.
        tokens: Rows wanted.
        shard_tokens: Rows that fit into one work item.

    Raises:
        TextError: No context of training text, or one context does not fit into an item.
    """
    if not len(split):
        raise TextError(
            "data.path: the training part of the text is shorter than one context; "
            "add text, or lower data.context_tokens or data.heldout_fraction"
        )
    rows_per_context = split.token_id.shape[1]
    if rows_per_context > shard_tokens:
        raise TextError(
            f"store.shard_tokens={shard_tokens}: expected at least the {rows_per_context} rows of "
            "a context; raise it, or lower data.context_tokens"
        )
    order = np.random.default_rng([seed, 0]).permutation(len(split))
    n_rows, n_contexts = 0, 0
    for start in range(0, len(order), PLAN_CONTEXTS):
        rows = n_rows + np.cumsum(split.kept(order[start : start + PLAN_CONTEXTS]).sum(axis=1))
        enough = int(np.searchsorted(rows, tokens))
        n_contexts = start + min(enough + 1, len(rows))
        n_rows = int(rows[n_contexts - start - 1])
        if n_rows >= tokens:
            break
    if not n_rows:
        raise TextError("data.path: the text holds nothing but special tokens")
    return ItemPlan(order[:n_contexts], shard_tokens // rows_per_context, n_rows)


def _write_streams(
    documents: Iterator[str],
    tokenizer: Any,
    separator_id: int,
    heldout_fraction: float,
    target: Path,
) -> dict[str, Any]:
    files = {
        (split, column): (target / f"{split}.{column}.bin").open("wb")
        for split in SPLITS
        for column in COLUMNS
    }
    counts = dict.fromkeys(SPLITS, 0)
    n_documents = 0
    try:
        for texts in _batches(documents):
            encoded = tokenizer(
                texts, add_special_tokens=False, return_attention_mask=False, verbose=False
            )["input_ids"]
            for text, ids in zip(texts, encoded, strict=True):
                split = SPLITS[is_heldout(text, heldout_fraction)]
                columns = {
                    "token_id": np.array([*ids, separator_id]),
                    "document": np.full(len(ids) + 1, n_documents),
                    "position": np.arange(len(ids) + 1),
                }
                for column, values in columns.items():
                    files[split, column].write(values.astype(COLUMNS[column]).tobytes())
                counts[split] += len(ids) + 1
                n_documents += 1
    finally:
        for file in files.values():
            file.close()
    return {"tokens": counts, "n_documents": n_documents}


def _batches(documents: Iterator[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    characters = 0
    for text in documents:
        batch.append(text)
        characters += len(text)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _open_split(
    folder: Path, name: str, context_tokens: int, bos_id: int, dropped_ids: tuple[int, ...]
) -> Split:
    columns: dict[str, Any] = {}
    for column, dtype in COLUMNS.items():
        file = folder / f"{name}.{column}.bin"
        width = context_tokens - 1
        shape = (file.stat().st_size // dtype.itemsize // width, width)
        # An empty file cannot be mapped.
        columns[column] = (
            np.memmap(file, dtype, "r", shape=shape) if shape[0] else np.zeros(shape, dtype)
        )
    return Split(**columns, bos_id=bos_id, dropped_ids=dropped_ids)
