"""Inference with a trained Gated SAE."""

from __future__ import annotations

import torch

from sae_core.architectures.gated.settings import GatedConfig
from sae_core.architectures.penalty.inference import PenaltyInference
from sae_core.inference_gradients import active_values, needs_gradient


class GatedInference(PenaltyInference):
    """A trained Gated SAE; see `SAE` for the arguments.

    p       = (x - b_dec) @ W_enc.T
    latents = relu(exp(r_mag) * p + b_mag) where p + b_enc > 0, else 0
    recon   = latents @ W_dec + b_dec

    `b_mag` [L] is in the units of the raw activations; `r_mag` [L] has none.
    """

    config: GatedConfig
    r_mag: torch.Tensor
    b_mag: torch.Tensor

    def dense_latents(self, projected: torch.Tensor) -> torch.Tensor:
        """See `PenaltyInference.dense_latents`."""
        is_open = projected + self.b_enc > 0
        return projected.mul_(self.r_mag.exp()).add_(self.b_mag).relu_().mul_(is_open)

    def encode_topk(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See `SAE.encode_topk`; the values' gradient is that of the magnitudes."""
        flat = self.rows_of(x)
        with torch.no_grad():
            values, indices = self.encode_rows(flat)
        weights = (self.W_enc, self.b_dec, self.r_mag, self.b_mag)
        if needs_gradient(flat, *weights):
            values = self._with_gradient(flat, values, indices)
        shape = (*x.shape[:-1], values.shape[-1])
        return values.view(shape), indices.view(shape)

    def _with_gradient(
        self, flat: torch.Tensor, values: torch.Tensor, indices: torch.Tensor
    ) -> torch.Tensor:
        """Return `values` [N, K] with the gradient of `exp(r_mag) * p + b_mag`."""
        scale, bias = self.r_mag.exp()[indices], self.b_mag[indices]
        # The function returns the values that it is given, here with the gradient of p.
        no_bias = torch.zeros_like(self.b_enc)
        p = active_values(flat - self.b_dec, self.W_enc, no_bias, values, indices)
        p = (values - bias.detach()) / scale.detach() + (p - p.detach())
        return torch.where(values > 0, scale * p + bias, values)
