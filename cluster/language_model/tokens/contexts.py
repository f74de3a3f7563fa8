"""Contexts of tokens, cut from the documents of a text.

Each document is assigned to the train or held-out split by a hash of its text (`heldout.py` has
the other rules) and turned into tokens (`encoders.py`). `streams.py` writes the tokens of a split
one after another, as `data.packing` says; a context is the BOS token followed by the next
`context_tokens - 1` tokens. The streams are cached as memory-mapped files, so that all processes on
a machine share the same pages.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cluster.language_model.cache import built_once, digest
from cluster.language_model.loading import tokenizer_sha256
from cluster.language_model.texts import Tally, find_text
from cluster.language_model.tokens.boundaries import boundary_ids, excluded_ids
from cluster.language_model.tokens.encoders import encoder_of
from cluster.language_model.tokens.streams import COLUMNS, COUNTS, NO_TOKEN, SPLITS, write_streams
from conf.schema.data import DataConfig

SCHEMA = 2


class ModelInputs(NamedTuple):
    """Arguments of the model's forward pass for n contexts of T tokens; None is left out."""

    input_ids: NDArray[np.int64]
    """Token ids, [n, T]. BOS comes first."""
    attention_mask: NDArray[np.int64] | None = None
    """0 for padding, else 1, [n, T]."""
    position_ids: NDArray[np.int64] | None = None
    """Positions that start again with every document, [n, T]. Tokens then see only their own."""

    def given(self) -> dict[str, NDArray[np.int64]]:
        """Return the arguments that are not None, by name."""
        return {name: value for name, value in self._asdict().items() if value is not None}


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
    """Index of each token within its document, [C, T-1]. `NO_TOKEN` marks padding, and BOS inside a
    context."""
    bos_id: int
    """Id of the token that begins every context."""
    dropped_ids: tuple[int, ...]
    """Ids of the tokens whose rows are not stored."""
    counts: NDArray[np.bool_] | None = None
    """True for the tokens whose rows may be stored, [C, T-1]; None means all."""
    packing: str = "joined"
    """How documents fill contexts: `data.packing`."""
    stored_positions: tuple[int, int | None] = (1, None)
    """First and last position of a context whose rows are stored; None means up to the end."""

    def __len__(self) -> int:
        return len(self.token_id)

    def input_ids(self, contexts: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the model's input [n, T] for n contexts, given by number. BOS comes first."""
        tokens = self.token_id[contexts].astype(np.int64)
        return np.pad(tokens, ((0, 0), (1, 0)), constant_values=self.bos_id)

    def model_inputs(self, contexts: NDArray[np.int64]) -> ModelInputs:
        """Return the arguments of the model for n contexts, given by number."""
        ids = self.input_ids(contexts)
        if self.packing == "joined":
            return ModelInputs(ids)
        inside = self._inside(contexts)
        if self.packing == "separate":
            mask = np.pad(inside.astype(np.int64), ((0, 0), (1, 0)), constant_values=1)
            return ModelInputs(ids, attention_mask=mask)
        # A document begins with BOS, which is marked as not being one of its tokens.
        columns = np.arange(ids.shape[1])
        begins = np.pad(~inside, ((0, 0), (1, 0)), constant_values=True)
        first = np.maximum.accumulate(np.where(begins, columns, 0), axis=1)
        return ModelInputs(ids, position_ids=columns - first)

    def kept(self, contexts: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Return a mask [n, T-1] of the rows that are stored, for n contexts, given by number.

        Position 0 of a context (BOS) is never stored and has no column in the mask.
        """
        kept = np.isin(self.token_id[contexts], self.dropped_ids, invert=True)
        first, last = self.stored_positions
        kept[:, : first - 1] = False
        if last is not None:
            kept[:, last:] = False
        if self.packing != "joined":
            kept &= self._inside(contexts)
        if self.counts is not None:
            kept &= self.counts[contexts]
        return kept

    def predicted(self, contexts: NDArray[np.int64]) -> NDArray[np.bool_] | None:
        """Return a mask [n, T-2] of the predictions from position 1 on that have a target.

        The target of a prediction is the next token of the same document; predictions at BOS are
        left out, because BOS is not replaced. None means that all predictions have a target.
        """
        if self.packing == "joined":
            return None
        inside = self._inside(contexts)
        return inside[:, :-1] & inside[:, 1:]

    def _inside(self, contexts: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Return a mask [n, T-1] of the tokens of documents: neither padding nor BOS."""
        return self.position[contexts] != NO_TOKEN


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
    given_ids: bool = False
    """True if the documents were given as token ids, which may be beyond the vocabulary."""
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
    key: dict[str, Any] = {
        "schema": SCHEMA,
        "text": source.sha256(cache_dir),
        "tokenizer": tokenizer_sha256(tokenizer),
        "context_tokens": data.context_tokens,
        "heldout_fraction": data.heldout_fraction,
        "separator_id": separator_id,
    }
    # Caches of the defaults do not have these keys.
    if data.heldout != "documents":
        key["heldout"] = data.heldout
    if data.kind != "text":
        key |= {"kind": data.kind, "roles": sorted(data.roles)}
    if data.kind == "chat":
        key["template"] = tokenizer.chat_template
    if data.packing != "joined":
        key["packing"] = data.packing
    if data.packing != "joined" or data.kind == "token_ids":
        key["bos_id"] = bos_id

    def build(target: Path) -> None:
        tally = Tally()
        encoder = encoder_of(data, tokenizer)
        meta = write_streams(source.documents(tally), encoder, (bos_id, separator_id), data, target)
        (target / "meta.json").write_text(json.dumps({**key, **meta, **asdict(tally)}))

    folder = built_once(cache_dir / "contexts" / digest(key), build)
    meta = json.loads((folder / "meta.json").read_text())
    dropped = set(excluded_ids(tokenizer, data))
    if data.drop_special_tokens:
        known = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
        dropped |= {bos_id, separator_id, *(i for i in known if i is not None)}
    dropped_ids = tuple(sorted(dropped))
    train, heldout = (_open_split(folder, name, data, bos_id, dropped_ids) for name in SPLITS)
    n_documents = int(meta["n_documents"])
    return Contexts(
        folder,
        data.context_tokens,
        n_documents,
        bos_id,
        separator_id,
        train,
        heldout,
        data.kind == "token_ids",
        meta,
    )


def _open_split(
    folder: Path, name: str, data: DataConfig, bos_id: int, dropped_ids: tuple[int, ...]
) -> Split:
    columns: dict[str, Any] = {}
    for column, dtype in COLUMNS.items():
        file = folder / f"{name}.{column}.bin"
        if column == COUNTS and not file.exists():
            continue
        width = data.context_tokens - 1
        shape = (file.stat().st_size // dtype.itemsize // width, width)
        # An empty file cannot be memory-mapped.
        columns[column] = (
            np.memmap(file, dtype, "r", shape=shape) if shape[0] else np.zeros(shape, dtype)
        )
    return Split(
        **columns,
        bos_id=bos_id,
        dropped_ids=dropped_ids,
        packing=data.packing,
        stored_positions=(data.first_position, data.last_position),
    )
