"""Training with dense autograd, one shard of the dictionary per rank.

Shape legend: B batch rows of this replica, D d_model, l latents of this shard.

Pre-activations, latents and their gradients are dense [B, l] tensors. A step holds several of them
at once, 4 * B * l bytes each: about 6 in the jumprelu and relu kinds and 10 in the gated kind. The
selection kinds need none of them. `parallel.latent` and `parallel.data` divide them.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, NamedTuple

import torch

from sae_core.architectures.base import SparseAutoencoder, StepOutput
from sae_core.architectures.penalty.settings import PenaltyConfig
from sae_core.distributed.differentiable import shared_by_group, sum_over_group
from sae_core.distributed.mesh import Mesh
from sae_core.kernels import Kernels


class Losses(NamedTuple):
    """What the loss of one step consists of. Scalars have the value of the whole dictionary."""

    latents: torch.Tensor
    """[B, l] latents of this shard."""
    squared_error: torch.Tensor
    """Scalar with gradient: squared error summed over this replica's rows and over D."""
    penalty: torch.Tensor
    """Scalar with gradient: all terms of the loss except the squared error."""
    metrics: dict[str, torch.Tensor]
    """Detached scalars, keyed by metric name."""


class PenaltySAE(SparseAutoencoder):
    """One rank's shard of an SAE with dense gradients and a penalty that warms up.

    A subclass implements `losses` and `encode_centred`. See `SparseAutoencoder` for the arguments.
    """

    config: PenaltyConfig

    def __init__(
        self, config: PenaltyConfig, d_model: int, mesh: Mesh, kernels: Kernels, seed: int
    ) -> None:
        super().__init__(config, d_model, mesh, kernels, seed)
        self.penalty_share = config.penalty_share(0)
        """Share of the full penalty in this step."""

    def begin_step(self, tokens: int) -> None:
        """See `SparseAutoencoder.begin_step`."""
        self.penalty_share = self.config.penalty_share(tokens)

    def forward(self, raw: torch.Tensor) -> StepOutput:
        """See `SparseAutoencoder.forward`. The loss is `squared_error / (B * D) + penalty`."""
        x = self.normalise(raw)
        found = self.losses(x)
        is_active = found.latents.detach() > 0
        return StepOutput(
            loss=found.squared_error / x.numel() + found.penalty,
            squared_error=found.squared_error.detach(),
            fired=is_active.any(0),
            n_active=is_active.sum(),
            metrics=found.metrics,
            input_total=x.sum(0),
            input_square=x.square().sum(),
        )

    @abstractmethod
    def losses(self, x: torch.Tensor) -> Losses:
        """Compute latents and losses; collective over the latent and data groups.

        Args:
            x: [B, D] normalised rows, the same on all ranks of the latent group.
        """

    @abstractmethod
    def encode_centred(self, centred: torch.Tensor) -> torch.Tensor:
        """Return this shard's latents [N, l] of normalised rows minus `b_dec`, [N, D]."""

    @torch.no_grad()
    def reconstruct_centred(self, centred: torch.Tensor) -> torch.Tensor:
        """See `SparseAutoencoder.reconstruct_centred`."""
        return self.decode(self.encode_centred(centred), self.W_dec)

    def centre(self, x: torch.Tensor) -> torch.Tensor:
        """Return `x - b_dec`, [B, D], for this shard's encoder.

        The gradient of `b_dec` through the encoder is summed over the shards.
        """
        return shared_by_group(x - self.b_dec, self.latent_group)

    def project(self, centred: torch.Tensor) -> torch.Tensor:
        """Return `centred @ W_enc.T`, [B, l] float32, multiplied in `Kernels.copy_dtype`."""
        return self._product(centred, self.W_enc.T)

    def decode(self, latents: torch.Tensor, W_dec: torch.Tensor) -> torch.Tensor:
        """Return the sum of `latents @ W_dec` over all shards, [B, D] float32; collective.

        Args:
            latents: [B, l] latents of this shard.
            W_dec: [l, D] decoder rows of this shard.
        """
        return sum_over_group(self._product(latents, W_dec), self.latent_group)

    def over_shards(self, part: torch.Tensor) -> torch.Tensor:
        """Return the sum of a differentiable scalar over the latent group; collective."""
        return sum_over_group(part, self.latent_group)

    def unit_decoder(self) -> torch.Tensor:
        """Return W_dec, [l, D], with the gradient projected onto the tangent of the unit sphere.

        The part along a row would only change its norm, which is set to 1 after the update, but it
        would enter Adam's moments.
        """
        rows: torch.Tensor = _Tangent.apply(self.W_dec)
        return rows

    def _product(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        # Kernels that multiply in bfloat16 keep copies in it; all others multiply in float32.
        dtype = self.kernels.copy_dtype or torch.float32
        return (a.to(dtype) @ b.to(dtype)).float()


class _Tangent(torch.autograd.Function):
    """See `PenaltySAE.unit_decoder`."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(rows)
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        (rows,) = ctx.saved_tensors
        return gradient - (gradient * rows).sum(1, keepdim=True) * rows
