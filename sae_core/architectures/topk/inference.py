"""Inference with a trained TopK SAE."""

from __future__ import annotations

import torch

from sae_core.architectures.topk.settings import TopKConfig
from sae_core.inference import SAE


class TopKInference(SAE):
    """A trained TopK SAE; see `SAE` for the arguments.

    pre_acts = (x - b_dec) @ W_enc.T + b_enc
    latents  = relu(topk(pre_acts, k))
    recon    = latents @ W_dec + b_dec
    """

    config: TopKConfig

    def encode_rows(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the k largest latents of each row; see `SAE.encode_rows`.

        Args:
            x: [N, D] float32 raw activations.

        Returns:
            Values [N, k] float32 after the ReLU, and indices [N, k] int64. If fewer than k
            pre-activations are positive, the remaining values are 0.
        """
        k = min(self.config.k, len(self.W_enc))  # a shard may have fewer latents than k
        values, indices = self.kernels.encode_topk(x - self.b_dec, self.W_enc, self.b_enc, k)
        values, order = values.relu().sort(dim=1, descending=True, stable=True)
        return values, indices.gather(1, order)
