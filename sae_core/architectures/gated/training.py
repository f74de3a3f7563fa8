"""Gated SAE (Rajamanoharan et al. 2024, arXiv 2404.16014), one shard of its dictionary per rank.

    x         = (mapped(raw) - input_mean) * input_scale
    p         = (x - b_dec) @ W_enc.T
    gate      = relu(p + b_enc)                      # b_enc is the paper's b_gate, W_enc its W_gate
    latents   = (gate > 0) * relu(exp(r_mag) * p + b_mag)
    recon     = latents @ W_dec + b_dec
    loss      = |x - recon|^2 / D + share * l1_coef * sum(gate) / D + |x - from_gate|^2 / D
    from_gate = gate @ W_dec + b_dec                 # with W_dec and b_dec held constant

The step `gate > 0` has no gradient: the gates learn from the last two terms (equation 8). Only the
gates are penalised, so that the latents do not shrink. `share` grows from 0 to 1 in the warm-up.
Memory: see `sae_core.architectures.penalty.training`.
"""

from __future__ import annotations

import torch

from sae_core.architectures.gated.settings import GatedConfig
from sae_core.architectures.penalty.training import Losses, PenaltySAE
from sae_core.distributed.mesh import Mesh
from sae_core.kernels import Kernels


class GatedSAE(PenaltySAE):
    """One rank's shard of a Gated SAE; see `SparseAutoencoder` for the arguments.

    `r_mag` [l] is the logarithm of the magnitudes' scale, `b_mag` [l] their bias.
    """

    config: GatedConfig

    def __init__(
        self, config: GatedConfig, d_model: int, mesh: Mesh, kernels: Kernels, seed: int
    ) -> None:
        super().__init__(config, d_model, mesh, kernels, seed)
        self.r_mag = self.add_rows("r_mag", torch.zeros_like(self.b_enc))
        self.b_mag = self.add_rows("b_mag", torch.zeros_like(self.b_enc))

    def losses(self, x: torch.Tensor) -> Losses:
        """See `PenaltySAE.losses`."""
        projected = self.project(self.centre(x))
        gate = (projected + self.b_enc).relu()
        latents = self._open(gate, projected)
        target = x - self.b_dec
        error = (target - self.decode(latents, self.unit_decoder())).square().sum()
        from_gate = self.decode(gate, self.W_dec.detach())
        gate_loss = (target.detach() - from_gate).square().sum() / x.numel()
        weight = self.penalty_share * self.config.l1_coef / x.numel()
        l1 = weight * self.over_shards(gate.sum())
        metrics = {"l1_penalty": l1.detach(), "gate_loss": gate_loss.detach()}
        return Losses(latents, error, l1 + gate_loss, metrics)

    def encode_centred(self, centred: torch.Tensor) -> torch.Tensor:
        """See `PenaltySAE.encode_centred`."""
        projected = self.project(centred)
        return self._open(projected + self.b_enc, projected)

    def _open(self, gate: torch.Tensor, projected: torch.Tensor) -> torch.Tensor:
        """Return the magnitudes of the latents whose gate is above 0, and 0 for others, [B, l]."""
        return (projected * self.r_mag.exp() + self.b_mag).relu() * (gate > 0)
