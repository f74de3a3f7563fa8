"""Sizes of a language model, from its modules and its configuration."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


def n_embeddings(model: nn.Module) -> int:
    """Return the number of token ids that the model has an embedding for."""
    # Not every nn.Module has this method, but every model of transformers does.
    embedding: nn.Embedding = model.get_input_embeddings()  # type: ignore[operator]
    return int(embedding.weight.shape[0])


def text_config(model: nn.Module) -> Any:
    """Return the configuration of the model's text part: its own, unless it also reads images."""
    # Not every nn.Module has a config, but every model of transformers does.
    config: Any = model.config
    return config.get_text_config()


def head_width(config: Any) -> int:
    """Return the width of an attention head from a text configuration."""
    stated = getattr(config, "head_dim", None)
    return int(stated or config.hidden_size // config.num_attention_heads)
