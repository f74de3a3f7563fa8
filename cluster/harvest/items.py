"""The plan of work items: which contexts each item holds."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cluster.language_model.errors import TextError
from cluster.language_model.tokens.contexts import Split

PLAN_CONTEXTS = 4096
"""Number of contexts whose rows are counted in one step. It bounds memory use."""


@dataclass(frozen=True)
class ItemPlan:
    """The contexts of each work item: a pure function of (text, tokenizer, data, seed)."""

    order: NDArray[np.int64]
    """Numbers of the training contexts to harvest, in the order of the items, [contexts]."""
    contexts_per_item: int
    """Number of contexts in each work item. The last item may have fewer."""
    n_rows: int
    """Total number of stored rows. Dropped rows are not counted."""

    @property
    def n_items(self) -> int:
        """Number of work items."""
        return -(-len(self.order) // self.contexts_per_item)

    def contexts(self, item: int) -> NDArray[np.int64]:
        """Return the numbers of the contexts in a work item, at most [contexts_per_item]."""
        return self.order[item * self.contexts_per_item : (item + 1) * self.contexts_per_item]


def plan_items(split: Split, seed: int, tokens: int, shard_tokens: int) -> ItemPlan:
    """Choose contexts in a seeded random order until they hold `tokens` rows or none are left.

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
            "data.path: the text consists of special tokens only; use another text, or set "
            "data.drop_special_tokens=false"
        )
    return ItemPlan(order[:n_contexts], shard_tokens // rows_per_context, n_rows)
