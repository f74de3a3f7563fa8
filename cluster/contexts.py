"""Contexts of tokens, cut from the documents of a text.

A hash of its text assigns each document to the train or held-out split. The documents of a split
are tokenised and joined into one stream, each followed by a separator token. A context is the BOS
token followed by the next `context_tokens - 1` tokens of the stream; an incomplete context at the
end is dropped. The streams are cached as memory-mapped files, so that all processes on a machine
share the same pages.
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
"""Characters of text passed to the tokenizer in one call; bounds memory."""
PLAN_CONTEXTS = 4096
"""Contexts whose rows are counted in one step; bounds memory."""


@dataclass(frozen=True)
class Split:
    """The C contexts of one split, T tokens each.

    T counts the BOS token, but the arrays leave it out.
    """

    token_id: NDArray[np.int32]
    """Token ids, [C, T-1]."""
    document: NDArray[np.int64]
    """Number of each token's document among all documents of the text, [C, T-1]."""
    position: NDArray[np.int32]
    """Index of each token within its document, [C, T-1]."""
    bos_id: int
    """Id of the token that begins every context."""
    dropped_ids: tuple[int, ...]
    """Ids of the tokens whose rows are not stored."""

    def __len__(self) -> int:
        return len(self.token_id)

    def input_ids(self, contexts: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the model's input [n, T], BOS first, for n contexts given by number."""
        tokens = self.token_id[contexts].astype(np.int64)
        return np.pad(tokens, ((0, 0), (1, 0)), constant_values=self.bos_id)

    def kept(self, contexts: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Return a mask [n, T-1] of the rows that are stored, for n contexts given by number.

        Position 0 of a context (BOS) is never stored and has no column in the mask.
        """
        return np.isin(self.token_id[contexts], self.dropped_ids, invert=True)


@dataclass(frozen=True)
class Contexts:
    """Both splits of a text, tokenised by one tokenizer."""

    folder: Path
    """Cache folder with the memory-mapped files."""
    context_tokens: int
    """Tokens per context, BOS included."""
    n_documents: int
    """Number of documents in both splits together."""
    bos_id: int
    """Id of the token that begins every context."""
    separator_id: int
    """Id of the token that follows every document."""
    train: Split
    heldout: Split


@dataclass(frozen=True)
class ItemPlan:
    """The contexts of each work item: a pure function of (text, tokenizer, data, seed)."""

    order: NDArray[np.int64]
    """Numbers of the training contexts to harvest, in the order of the items, [contexts]."""
    contexts_per_item: int
    """Contexts in each work item, except that the last one may have fewer."""
    n_rows: int
    """Total number of stored rows, without the dropped ones."""

    @property
    def n_items(self) -> int:
        """Number of work items; the last one may have fewer contexts."""
        return -(-len(self.order) // self.contexts_per_item)

    def contexts(self, item: int) -> NDArray[np.int64]:
        """Return the numbers of the contexts in a work item, at most [contexts_per_item]."""
        return self.order[item * self.contexts_per_item : (item + 1) * self.contexts_per_item]


def prepare_contexts(data: DataConfig, tokenizer: Any, cache_dir: Path) -> Contexts:
    """Tokenise the text into the cache, unless it is there already, and open it.

    Raises:
        TextError: If the text cannot be read, or the tokenizer has neither BOS nor EOS token.
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
    """Return the id of the token that begins a context and of the one that separates documents.

    If the vocabulary has `<|endoftext|>`, it is used for both: these models were pre-trained with
    it, although their chat versions declare other tokens as BOS and EOS. Otherwise the tokens are
    BOS and EOS; if one is missing, the other is used for both.

    Raises:
        TextError: If the tokenizer has none of these tokens.
    """
    end_of_text = tokenizer.get_vocab().get("<|endoftext|>")
    if end_of_text is not None:
        return int(end_of_text), int(end_of_text)
    bos_id, eos_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    if bos_id is None and eos_id is None:
        raise TextError(
            "the tokenizer has neither a BOS nor an EOS token; set one of them in the model's "
            "tokenizer and save it"
        )
    return int(eos_id if bos_id is None else bos_id), int(bos_id if eos_id is None else eos_id)


def is_heldout(text: str, fraction: float) -> bool:
    """Return True if a document belongs to the held-out split.

    The decision depends on the text alone, so that copies of a document are in the same split.
    """
    head = hashlib.sha256(text.encode()).digest()[:8]
    return int.from_bytes(head, "big") < fraction * 2**64


def plan_items(split: Split, seed: int, tokens: int, shard_tokens: int) -> ItemPlan:
    """Choose contexts in a seeded random order until they hold `tokens` rows, or take all of them.

    Args:
        split: The training contexts.
        seed: Seed of the run.
        tokens: Number of rows to store.
        shard_tokens: Number of rows that fit into one work item.

    Raises:
        TextError: If the split is empty, a context does not fit into an item, or no row would be
            stored.
    """
    if not len(split):
        raise TextError(
            "data.path: the training split of the text is shorter than one context; "
            "add text, or lower data.context_tokens or data.heldout_fraction"
        )
    rows_per_context = split.token_id.shape[1]
    if rows_per_context > shard_tokens:
        raise TextError(
            f"store.shard_tokens={shard_tokens}: expected at least {rows_per_context}, the number "
            "of rows in a context; raise it, or lower data.context_tokens"
        )
    order = np.random.default_rng([seed, 0]).permutation(len(split))
    n_rows = 0
    n_contexts = 0
    for start in range(0, len(order), PLAN_CONTEXTS):
        rows = n_rows + np.cumsum(split.kept(order[start : start + PLAN_CONTEXTS]).sum(axis=1))
        enough = int(np.searchsorted(rows, tokens))  # first context that reaches `tokens` rows
        n_contexts = start + min(enough + 1, len(rows))
        n_rows = int(rows[n_contexts - start - 1])
        if n_rows >= tokens:
            break
    if not n_rows:
        raise TextError(
            "data.path: the text consists of special tokens only; expected other text, or set "
            "data.drop_special_tokens=false"
        )
    return ItemPlan(order[:n_contexts], shard_tokens // rows_per_context, n_rows)


def _write_streams(
    documents: Iterator[str],
    tokenizer: Any,
    separator_id: int,
    heldout_fraction: float,
    target: Path,
) -> dict[str, Any]:
    """Write the token streams of both splits to `target`; return the counts for `meta.json`."""
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
            batch = []
            characters = 0
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
        # An empty file cannot be memory-mapped.
        columns[column] = (
            np.memmap(file, dtype, "r", shape=shape) if shape[0] else np.zeros(shape, dtype)
        )
    return Split(**columns, bos_id=bos_id, dropped_ids=dropped_ids)
