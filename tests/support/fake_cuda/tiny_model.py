"""A causal language model of one layer, and held-out contexts for it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import nn

from cluster.language_model.tokens.contexts import Split
from cluster.language_model.tokens.streams import NO_TOKEN

VOCABULARY, TOKENS = 50, 16


class TinyModel(nn.Module):
    """Embedding, a layer named `layer`, and logits."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, d_model)
        self.layer = nn.Linear(d_model, d_model)
        self.head = nn.Linear(d_model, VOCABULARY)

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, use_cache: bool
    ) -> Any:
        """Return an object with `logits`, [contexts, tokens, vocabulary]."""
        return SimpleNamespace(logits=self.head(self.layer(self.embedding(input_ids))))


def tiny_split(n_contexts: int) -> Split:
    """Return held-out contexts with padding, so that some predictions have no target."""
    shape = (n_contexts, TOKENS - 1)
    position = np.tile(np.arange(TOKENS - 1, dtype=np.int32), (n_contexts, 1))
    position[:, -3:] = NO_TOKEN
    return Split(
        np.ones(shape, np.int32), np.zeros(shape, np.int64), position, 0, (), packing="separate"
    )
