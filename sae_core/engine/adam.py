"""Adam over a sharded dictionary, clipped by the norm of the gradient over all shards."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from sae_core.config import OptimConfig
from sae_core.kernels import square_sum

if TYPE_CHECKING:
    from sae_core.architectures.base import SparseAutoencoder


class ShardedAdam(torch.optim.Adam):
    """Fused Adam that clips by the gradient norm over all shards and can skip updates.

    Both happen on the device without a host sync: the fused kernel divides gradients by
    `grad_scale`, and skips the update if `found_inf` is set.

    Args:
        sae: SAE to update; its sharded parameters have `tensor_model_parallel=True`.
        lr: Learning rate of the first step.
        config: Betas, eps.
        clip_norm: Maximum global gradient norm. 0 means no limit. None leaves the norm and clipping
            to the engine. ZeRO 1 requires this, because it passes flat pieces of parameters, and
            this class cannot tell which of them are sharded.
    """

    def __init__(
        self, sae: SparseAutoencoder, lr: float, config: OptimConfig, clip_norm: float | None
    ) -> None:
        betas = (config.beta1, config.beta2)
        super().__init__(sae.parameters(), lr=lr, betas=betas, eps=config.eps, fused=True)
        device = sae.b_dec.device
        self.clip_norm = clip_norm
        self.latent_group = sae.latent_group
        self.found_inf = torch.zeros((), device=device)
        """Scalar: 1 to skip the update, else 0. `step` may set it but never clears it."""
        self.grad_scale: torch.Tensor | None = None
        """Scalar by which the fused kernel divides gradients; None means no clipping."""
        self._global_grad_norm = torch.zeros((), device=device)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Apply one update, unless `found_inf` is set or the gradient norm is not finite."""
        if self.clip_norm is not None:
            self._record_norm(self._grad_norm())
            if self.clip_norm > 0:
                self.grad_scale = (self._global_grad_norm / self.clip_norm).clamp_min(1.0)
        return super().step(closure)

    def _record_norm(self, norm: torch.Tensor) -> None:
        self._global_grad_norm.copy_(norm)
        torch.maximum(self.found_inf, (~norm.isfinite()).float(), out=self.found_inf)

    def discard_gradient(self) -> None:
        """Drop the gradient of a backward pass that no step follows."""
        self.zero_grad()

    def allocate_state(self) -> None:
        """Create the moments before the first step, so that a checkpoint can be loaded."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if not self.state[parameter]:
                    dtype = self.moment_dtype(parameter)
                    self.state[parameter] = {
                        "step": torch.zeros((), device=parameter.device),
                        "exp_avg": torch.zeros_like(parameter, dtype=dtype),
                        "exp_avg_sq": torch.zeros_like(parameter, dtype=dtype),
                    }

    def moment_dtype(self, parameter: torch.Tensor) -> torch.dtype:
        """Return the dtype of a parameter's moments."""
        return parameter.dtype

    def _grad_norm(self) -> torch.Tensor:
        """Return the norm of the whole gradient; collective over the latent group.

        Squared gradients of sharded parameters are summed over the group; those of replicated
        parameters are counted once.
        """
        sharded = self._collected_square()
        replicated = torch.zeros_like(self.found_inf)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                square = square_sum(parameter.grad)
                if getattr(parameter, "tensor_model_parallel", False):
                    sharded += square
                else:
                    replicated += square
        if self.latent_group is not None:
            dist.all_reduce(sharded, group=self.latent_group)
        return (sharded + replicated).sqrt()

    def _collected_square(self) -> torch.Tensor:
        """Return the squared norm of this shard's gradients that are not stored in a `.grad`."""
        return torch.zeros_like(self.found_inf)
