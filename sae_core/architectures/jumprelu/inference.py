"""Inference with a trained JumpReLU SAE."""

from __future__ import annotations

import torch

from sae_core.architectures.jumprelu.settings import JumpReLUConfig
from sae_core.architectures.penalty.inference import PenaltyInference


class JumpReLUInference(PenaltyInference):
    """A trained JumpReLU SAE; see `SAE` for the arguments.

    pre_acts = (x - b_dec) @ W_enc.T + b_enc
    latents  = pre_acts where pre_acts > threshold, else 0
    recon    = latents @ W_dec + b_dec

    `threshold` [L] is at least 0, in the units of the raw activations.
    """

    config: JumpReLUConfig
    threshold: torch.Tensor

    def dense_latents(self, projected: torch.Tensor) -> torch.Tensor:
        """See `PenaltyInference.dense_latents`."""
        pre_acts = projected.add_(self.b_enc)
        return pre_acts.masked_fill_(pre_acts <= self.threshold, 0.0)
