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

    @torch.no_grad()
    def encode_topk(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the k largest latents of each row; see `SAE.encode_topk`.

        Args:
            x: [..., D] raw activations of any float dtype.

        Returns:
            Values [..., k] float32 after the ReLU, and indices [..., k] int64. If fewer than k
            pre-activations are positive, the remaining values are 0.

        Raises:
            ShapeError: If the last dimension of `x` is not D.
        """
        flat = self.rows_of(x)
        k = min(self.config.k, len(self.W_enc))  # a shard may have fewer latents than k
        values, indices = self.kernels.encode_topk(flat - self.b_dec, self.W_enc, self.b_enc, k)
        values, order = values.relu().sort(dim=1, descending=True, stable=True)
        shape = (*x.shape[:-1], k)
        return values.view(shape), indices.gather(1, order).view(shape)
