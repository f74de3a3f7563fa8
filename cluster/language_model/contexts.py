"""Contexts of tokens, cut from the documents of a text.

Each document is assigned to the train or held-out split by a hash of its text (`heldout.py` has
the other rules). The documents of a split are tokenised and joined into one stream, with a
separator token after each document. A context is the BOS token followed by the next
`context_tokens - 1` tokens of the stream; an incomplete context at the end of the stream is
dropped. The streams are cached as memory-mapped files, so that all processes on a machine share the
same pages.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cluster.language_model.boundaries import boundary_ids, special_strings
from cluster.language_model.cache import built_once, digest
from cluster.language_model.heldout import parts_of_splits
from cluster.language_model.loading import tokenizer_sha256
from cluster.language_model.long_documents import encode_documents
from cluster.language_model.texts import Tally, find_text
from conf.schema.data import DataConfig

SCHEMA = 2
SPLITS = ("train", "heldout")
COLUMNS: dict[str, np.dtype[Any]] = {
    "token_id": np.dtype("<i4"),
    "document": np.dtype("<i8"),
    "position": np.dtype("<i4"),
}
BATCH_CHARACTERS = 4_000_000
"""Number of characters of text passed to the tokenizer in one call. It bounds memory use."""


@dataclass(frozen=True)
class Split:
    """The C contexts of one split, with T tokens each.

    T includes the BOS token, but the arrays leave it out.
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
        """Return the model's input [n, T] for n contexts, given by number. BOS comes first."""
        tokens = self.token_id[contexts].astype(np.int64)
        return np.pad(tokens, ((0, 0), (1, 0)), constant_values=self.bos_id)

    def kept(self, contexts: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Return a mask [n, T-1] of the rows that are stored, for n contexts, given by number.

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
    counts: dict[str, Any] = field(default_factory=dict)
    """Numbers of `meta.json`: `documents` and `tokens` of each split, and the fields of `Tally`."""


def prepare_contexts(data: DataConfig, tokenizer: Any, cache_dir: Path) -> Contexts:
    """Tokenise the text into the cache, if it is not cached yet, and open the result.

    Raises:
        TextError: If the text cannot be read, or the tokenizer has neither BOS nor EOS token.
        ConfigError: If `data.bos_token` or `data.separator_token` is not in the vocabulary.
    """
    source = find_text(data)
    bos_id, separator_id = boundary_ids(tokenizer, data)
    key = {
        "schema": SCHEMA,
        "text": source.sha256(cache_dir),
        "tokenizer": tokenizer_sha256(tokenizer),
        "context_tokens": data.context_tokens,
        "heldout_fraction": data.heldout_fraction,
        "separator_id": separator_id,
    }
    if data.heldout != "documents":  # caches of the default have no such key
        key["heldout"] = data.heldout

    def build(target: Path) -> None:
        tally = Tally()
        meta = _write_streams(source.documents(tally), tokenizer, separator_id, data, target)
        (target / "meta.json").write_text(json.dumps({**key, **meta, **asdict(tally)}))

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
    return Contexts(
        folder, data.context_tokens, n_documents, bos_id, separator_id, train, heldout, meta
    )


def _write_streams(
    documents: Iterator[str],
    tokenizer: Any,
    separator_id: int,
    data: DataConfig,
    target: Path,
) -> dict[str, Any]:
    """Write the token streams of both splits to `target`. Return the counts for `meta.json`."""
    files = {
        (split, column): (target / f"{split}.{column}.bin").open("wb")
        for split in SPLITS
        for column in COLUMNS
    }
    counts = dict.fromkeys(SPLITS, 0)
    documents_of = dict.fromkeys(SPLITS, 0)
    n_documents = n_special = 0
    specials = special_strings(tokenizer)
    try:
        for texts in _batches(documents):
            # Special tokens that are written in a document are text, not tokens of the model.
            encoded = encode_documents(tokenizer, texts, split_special_tokens=True)
            if specials is not None:
                n_special += sum(len(specials.findall(text)) for text in texts)
            for text, ids in zip(texts, encoded, strict=True):
                for split, start, stop in parts_of_splits(text, len(ids), data):
                    columns = {
                        "token_id": np.append(ids[start:stop], separator_id),
                        "document": np.full(stop - start + 1, n_documents),
                        "position": np.arange(start, stop + 1),
                    }
                    for column, values in columns.items():
                        files[split, column].write(values.astype(COLUMNS[column], copy=False).data)
                    counts[split] += stop - start + 1
                    documents_of[split] += 1
                n_documents += 1
    finally:
        for file in files.values():
            file.close()
    return {
        "tokens": counts,
        "documents": documents_of,
        "n_documents": n_documents,
        "special_strings": n_special,
    }


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
