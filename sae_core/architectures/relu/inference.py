"""Inference with a trained ReLU SAE."""

from __future__ import annotations

import torch

from sae_core.architectures.penalty.inference import PenaltyInference
from sae_core.architectures.relu.settings import ReLUConfig


class ReLUInference(PenaltyInference):
    """A trained ReLU SAE; see `SAE` for the arguments.

    latents = relu((x - b_dec) @ W_enc.T + b_enc)
    recon   = latents @ W_dec + b_dec
    """

    config: ReLUConfig

    def dense_latents(self, projected: torch.Tensor) -> torch.Tensor:
        """See `PenaltyInference.dense_latents`."""
        return projected.add_(self.b_enc).relu_()
