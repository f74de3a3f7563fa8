"""Report on the text before the harvest, and a check of both splits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from cluster.language_model.errors import TextError

if TYPE_CHECKING:
    from cluster.language_model.tokens.contexts import Contexts
    from conf.schema.data import DataConfig

_SHOWN_TOKENS = 8


def counts_lines(contexts: Contexts, eval_tokens: int) -> list[str]:
    """Return lines to print: the documents that were read, and those that were skipped.

    Args:
        contexts: The contexts of the text.
        eval_tokens: Number of held-out tokens that the evaluation requires.
    """
    counts = contexts.counts
    if "null" not in counts:  # a cache of an earlier version
        return [_documents(contexts.n_documents)]
    documents, tokens = counts["documents"], counts["tokens"]
    lines = [
        f"{_documents(contexts.n_documents)}: {documents['train']:,} for training "
        f"({tokens['train']:,} tokens), {documents['heldout']:,} held out "
        f"({tokens['heldout']:,} tokens)"
    ]
    if counts["null"] or counts["blank"]:
        lines.append(f"skipped {counts['null']:,} null and {counts['blank']:,} blank ones")
    if counts["parts"]:
        parts = ", ".join(f"{number:,} of {name}" for name, number in counts["parts"].items())
        lines.append(f"mixture: {parts}")
    if counts["ended_by"]:
        lines.append(f"the mixture ends here because {counts['ended_by']} has no more documents")
    no_token, n_tokens = counts.get("no_token", 0), sum(tokens.values())
    if contexts.train.packing == "separate" and no_token:
        share = no_token / (no_token + n_tokens)
        lines.append(f"{share:.0%} of all positions are padding, because data.packing=separate")
    held_out = len(contexts.heldout) * contexts.context_tokens
    if held_out > 0 and len(contexts.heldout) < eval_tokens // contexts.context_tokens:
        lines.append(
            f"only {held_out:,} tokens in whole contexts are held out for the evaluation, fewer "
            f"than eval.tokens={eval_tokens:,}: its metrics will be less precise"
        )
    return lines


def require_splits(contexts: Contexts, data: DataConfig) -> None:
    """Check that both splits have a context, unless nothing is to be held out.

    Raises:
        TextError: If the training or the held-out part of the text is shorter than one context.
    """
    documents = contexts.counts.get("documents", {})
    tokens = contexts.counts.get("tokens", {})

    def has(split: str) -> str:
        number = _documents(documents[split]) if split in documents else "documents"
        return f"{number} with {tokens.get(split, 0):,} tokens"

    if not len(contexts.train):
        raise TextError(
            f"data.path: the training split of the text is shorter than one context of "
            f"data.context_tokens={contexts.context_tokens}: {has('train')}, and {has('heldout')} "
            f"held out (data.heldout={data.heldout}, data.heldout_fraction="
            f"{data.heldout_fraction:g}); add text, lower data.context_tokens, or set "
            "data.heldout=tokens to hold out a part of each document instead of whole documents"
        )
    if data.heldout != "none" and not len(contexts.heldout):
        raise TextError(
            f"data.heldout_fraction={data.heldout_fraction:g}: the held-out part of the text is "
            f"shorter than one context of data.context_tokens={contexts.context_tokens}: "
            f"{has('heldout')}, of {_documents(contexts.n_documents)}. Set data.heldout=tokens to "
            "hold out the last part of each document, raise the fraction, or set data.heldout=none "
            "to hold out nothing and evaluate on stored rows"
        )


def _documents(number: int) -> str:
    return "1 document" if number == 1 else f"{number:,} documents"


def token_lines(contexts: Contexts, tokenizer: Any, kind: str = "text") -> list[str]:
    """Return lines to print: the first tokens, and special tokens that are written in documents.

    Args:
        contexts: The contexts of the text.
        tokenizer: Tokenizer of the model.
        kind: What a document is, `data.kind`.
    """
    lines = []
    if len(contexts.train):
        ids = contexts.train.input_ids(np.array([0]))[0][:_SHOWN_TOKENS].tolist()
        shown = ", ".join(f"{tokenizer.decode([one])!r} ({one})" for one in ids)
        lines.append(f"the first context begins with {shown}")
    n_special = contexts.counts.get("special_strings", 0)
    if n_special:
        lines.append(
            f"{n_special:,} special tokens are written in the documents, such as "
            f"{tokenizer.all_special_tokens[0]!r}; "
            + (
                "the chat template turns them into special tokens"
                if kind == "chat"
                else "they are read as text"
            )
        )
    return lines
