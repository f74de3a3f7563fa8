"""Adam over a sharded dictionary, and the learning rate as a pure function of the tokens seen."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist

from sae_core.config import OptimConfig


def peak_lr(config: OptimConfig, n_latents: int) -> float:
    """The configured rate, or 2e-4 / sqrt(n_latents / 2**14) (Gao et al. 2024)."""
    return config.lr if config.lr is not None else 2e-4 / (n_latents / 2**14) ** 0.5


def lr_at(config: OptimConfig, n_latents: int, tokens: int, total_tokens: int) -> float:
    """Learning rate of the step that begins after `tokens` of `total_tokens` training tokens."""
    warmup = 1.0
    if config.warmup_tokens:
        warmup = min(1.0, tokens / config.warmup_tokens)
    decay = 1.0
    if config.decay_tokens:
        decay = min(1.0, (total_tokens - tokens) / config.decay_tokens)
    return peak_lr(config, n_latents) * warmup * decay


class ShardedAdam(torch.optim.Adam):
    """Fused Adam that clips by the norm over all shards and skips an update it is told to skip.

    Both happen on the device, without a host sync: clipping as a divisor inside the fused kernel,
    skipping through its `found_inf` flag.

    Args:
        parameters: this rank's parameters; shards carry `tensor_model_parallel=True`.
        lr: learning rate of the first step.
        config: betas, eps.
        clip_norm: largest global gradient norm; 0 leaves clipping to somebody else (ZeRO 1 gives
            this class flat pieces whose owner it cannot know, so the engine clips there).
        latent_group: ranks that share the dictionary; None: it is whole here.
        device: where the parameters are.
    """

    def __init__(
        self,
        parameters: Iterable[torch.nn.Parameter],
        lr: float,
        config: OptimConfig,
        clip_norm: float,
        latent_group: dist.ProcessGroup | None,
        device: torch.device,
    ) -> None:
        super().__init__(
            parameters, lr=lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True
        )
        self.clip_norm = clip_norm
        self.latent_group = latent_group
        self.found_inf = torch.zeros((), device=device)
        """1: make no update. Stays until somebody clears it."""
        self.grad_scale: torch.Tensor | None = None
        self._global_grad_norm = torch.zeros((), device=device)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update, unless `found_inf` is set or the gradient norm is not finite."""
        if self.clip_norm > 0:
            norm = self._grad_norm()
            self._global_grad_norm = norm
            self.found_inf = torch.maximum(self.found_inf, (~norm.isfinite()).float())
            self.grad_scale = (norm / self.clip_norm).clamp_min(1.0)
        return super().step(closure)

    def _grad_norm(self) -> torch.Tensor:
        """Norm of the whole gradient: shards summed over the latent group, replicated ones once."""
        sharded = torch.zeros_like(self.found_inf)
        replicated = torch.zeros_like(self.found_inf)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                square = parameter.grad.norm().square()
                if getattr(parameter, "tensor_model_parallel", False):
                    sharded += square
                else:
                    replicated += square
        if self.latent_group is not None:
            dist.all_reduce(sharded, group=self.latent_group)
        return (sharded + replicated).sqrt()
