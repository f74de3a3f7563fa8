"""The learning-rate schedule, a pure function of the tokens seen."""

from __future__ import annotations

from sae_core.config import OptimConfig


def peak_lr(config: OptimConfig, n_latents: int) -> float:
    """Return the learning rate between warm-up and decay.

    If `config.lr` is not set, the rate is `config.lr_at_16k` scaled as 1 / sqrt(n_latents) (Gao et
    al. 2024).
    """
    return config.lr if config.lr is not None else config.lr_at_16k / (n_latents / 2**14) ** 0.5


def lr_at(config: OptimConfig, n_latents: int, tokens: int, total_tokens: int) -> float:
    """Return the learning rate of the step that starts after `tokens` of `total_tokens` tokens."""
    warmup = 1.0
    if config.warmup_tokens:
        warmup = min(1.0, tokens / config.warmup_tokens)
    decay = 1.0
    if config.decay_tokens:
        decay = min(1.0, (total_tokens - tokens) / config.decay_tokens)
    return peak_lr(config, n_latents) * warmup * decay
