"""A causal language model of one layer, and held-out contexts for it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

VOCABULARY, TOKENS = 50, 16


class TinyModel(nn.Module):
    """Embedding, a layer named `layer`, and logits."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, d_model)
        self.layer = nn.Linear(d_model, d_model)
        self.head = nn.Linear(d_model, VOCABULARY)

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
        """Return an object with `logits`, [contexts, tokens, vocabulary]."""
        return SimpleNamespace(logits=self.head(self.layer(self.embedding(input_ids))))


class TinySplit:
    """Held-out contexts; see `cluster.language_model.tokens.contexts.Split`."""

    def input_ids(self, contexts: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return [contexts, tokens] int64."""
        return np.zeros((len(contexts), TOKENS), np.int64)

    def kept(self, contexts: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Return which positions but the first a store would keep, [contexts, tokens - 1]."""
        return np.ones((len(contexts), TOKENS - 1), np.bool_)
