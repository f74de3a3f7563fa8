"""Check that a model suits a run, before any work: its files, hookpoints, positions and vocabulary.

The checks use the model's skeleton (`loading.load_skeleton`), which takes seconds for any model.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.language_model.errors import ModelError
from cluster.language_model.hookpoint_kinds import resolve
from cluster.language_model.hooks import capture, find_module
from cluster.language_model.loading import (
    auto_class,
    load_skeleton,
    model_config,
    quiet_transformers,
    reading,
)
from cluster.language_model.sizes import head_width, n_embeddings, text_config
from conf.schema.model import ModelConfig
from foundation.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

    from cluster.language_model.tokens.contexts import Contexts

NEEDS_VALUES = (RuntimeError, NotImplementedError, ValueError, TypeError, AttributeError)
"""What a pass through a model without weights raises if the model looks at values, such as to route
tokens to experts: torch has no error of its own for it, and a model may raise whatever it meets."""


def require_usable_model(cfg: ModelConfig, context_tokens: int, cache_dir: Path) -> nn.Module:
    """Check files, hookpoints and context length, and return the model's skeleton.

    Raises:
        ModelError: If the files are incomplete or damaged, or a hookpoint's module does not exist.
        ConfigError: If `context_tokens` is more than the model's number of positions.
    """
    skeleton = load_skeleton(cfg, cache_dir)
    for hookpoint in cfg.hookpoints:
        find_module(skeleton, resolve(hookpoint)[0].module)
    limit = position_limit(skeleton)
    if limit is not None and context_tokens > limit:
        raise ConfigError(
            "data.context_tokens",
            context_tokens,
            f"at most {limit}, the number of positions of {cfg.path}",
            f"set data.context_tokens={limit} or less",
        )
    return skeleton


def require_known_tokens(skeleton: nn.Module, tokenizer: Any, contexts: Contexts) -> None:
    """Check that the model has an embedding for every token of the text.

    Args:
        skeleton: The model, or its skeleton.
        tokenizer: Tokenizer of the text.
        contexts: The tokenised text. It is only read if it was given as ids, or the tokenizer has
            more tokens than the model.

    Raises:
        ModelError: If a token id is beyond the model's embedding.
    """
    limit = n_embeddings(skeleton)
    if not contexts.given_ids and max(tokenizer.get_vocab().values()) < limit:
        return
    ids = [contexts.bos_id, contexts.separator_id]
    ids += [int(s.token_id.max()) for s in (contexts.train, contexts.heldout) if len(s)]
    if max(ids) >= limit:
        raise ModelError(
            f"model.path: the text has token id {max(ids)} "
            f"({tokenizer.convert_ids_to_tokens(max(ids))!r}); expected ids below {limit}, "
            "the number of the model's embeddings; use the tokenizer that belongs to the model"
        )


def position_limit(model: nn.Module) -> int | None:
    """Return the largest number of tokens in a context, or None if the model has no limit.

    Models with rotary positions compute beyond their limit, but were not trained for it. Scaling
    that the configuration declares counts; a sliding window is not a limit.
    """
    from torch import nn

    text = text_config(model)
    if getattr(text, "alibi", False) or text.model_type == "mpt":
        return None
    limit = getattr(text, "max_position_embeddings", None)
    if not isinstance(limit, int) or limit < 1:
        return None
    for name, module in model.named_modules():
        # RoBERTa and its relatives number positions from `padding_idx + 1`.
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            first = 0 if module.padding_idx is None else module.padding_idx + 1
            limit = min(limit, module.num_embeddings - first)
    return max(limit, int(_scaled_positions(getattr(text, "rope_parameters", None) or {}, limit)))


def _scaled_positions(rope: dict[str, Any], limit: int) -> float:
    """Return the number of positions that the scaling in a rotary configuration reaches, or 0."""
    nested = [value for value in rope.values() if isinstance(value, dict)]
    if nested:  # one for each type of layer; the shortest counts
        return min(_scaled_positions(value, limit) for value in nested)
    original = rope.get("original_max_position_embeddings") or limit
    return float(rope.get("factor") or 0) * original


def hookpoint_width(cfg: ModelConfig, hookpoint: str, cache_dir: Path) -> int:
    """Return the width D of a hookpoint's rows, using only the model's configuration.

    The width is measured on the model without weights. Where that is not possible, for example
    because the model depends on values, the width is the one that the kind expects.

    Raises:
        ModelError: If the model or the hookpoint's module is not found, or its configuration lacks
            the size.
        ConfigError: If the hookpoint is malformed, or its kind or options do not exist.
    """
    import torch

    resolve(hookpoint)
    try:
        model = model_without_weights(cfg, cache_dir)
    except ModelError:
        return _stated_width(cfg, hookpoint, cache_dir)
    try:
        with torch.device("meta"):
            ids = torch.zeros(1, 2, dtype=torch.int64)
            found = capture(model, [hookpoint], ids, attention_mask=torch.ones_like(ids))
        return int(found[hookpoint].shape[-1])
    except NEEDS_VALUES:
        return _stated_width(cfg, hookpoint, cache_dir)


def _stated_width(cfg: ModelConfig, hookpoint: str, cache_dir: Path) -> int:
    """Return the width that the hookpoint's kind expects from the model's configuration.

    Raises:
        ModelError: If the configuration is not found, or lacks the size.
    """
    parsed, kind = resolve(hookpoint)
    try:
        return kind.width(parsed, model_config(cfg, cache_dir).get_text_config())
    except AttributeError as error:
        raise ModelError(
            f"model.path={cfg.path!r}: expected a config with the width of {hookpoint!r}: {error}"
        ) from error


def model_without_weights(cfg: ModelConfig, cache_dir: Path) -> nn.Module:
    """Build the model on the meta device from its configuration alone, in `cfg.dtype`.

    Raises:
        ModelError: If the model or a usable configuration is not found.
    """
    import torch

    config = model_config(cfg, cache_dir)
    what = f"model.path: could not build the model of {cfg.path!r} from its configuration"
    with quiet_transformers(), torch.device("meta"), reading(what):
        # The masks of eager attention do not depend on values, which these tensors lack.
        model: nn.Module = auto_class(config, cfg.kind).from_config(
            config,
            trust_remote_code=False,
            attn_implementation="eager",
            dtype=getattr(torch, cfg.dtype),
        )
    return model.eval()


def head_counts(model: nn.Module) -> list[tuple[str, int]]:
    """Return the numbers of attention heads, in words, and their widths; [] if it has none."""
    text = text_config(model)
    heads = getattr(text, "num_attention_heads", None)
    if not isinstance(heads, int) or heads < 1:
        return []
    width = head_width(text)
    keys = getattr(text, "num_key_value_heads", None) or heads
    if keys == heads:
        return [(f"{heads} heads", width)]
    return [(f"{heads} heads ({keys} of keys and values)", width)]
