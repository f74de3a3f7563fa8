"""ReLU SAE with an L1 penalty, one shard of its dictionary per rank.

    x         = (mapped(raw) - input_mean) * input_scale
    latents   = relu((x - b_dec) @ W_enc.T + b_enc)
    recon     = latents @ W_dec + b_dec
    loss      = |x - recon|^2 / D + share * l1_coef * sum(latents * norm) / D

`norm` is 1 with `decoder_norm=unit` (Bricken et al. 2023, "Towards Monosemanticity"; Conmy's and
Marks' recipes), and |W_dec| of the latent's row with `decoder_norm=penalty` (Anthropic, "Circuits
Updates - April 2024"). `share` grows from 0 to 1 in the warm-up. Memory: see
`sae_core.architectures.penalty.training`. Resampling: see `sae_core.architectures.relu.resampling`.
"""

from __future__ import annotations

import torch

from sae_core.architectures.penalty.training import Losses, PenaltySAE
from sae_core.architectures.relu.resampling import resample_dead
from sae_core.architectures.relu.settings import ReLUConfig
from sae_core.distributed.mesh import Mesh
from sae_core.kernels import Kernels


class ReLUSAE(PenaltySAE):
    """One rank's shard of a ReLU SAE; see `SparseAutoencoder` for the arguments."""

    config: ReLUConfig

    def __init__(
        self, config: ReLUConfig, d_model: int, mesh: Mesh, kernels: Kernels, seed: int
    ) -> None:
        super().__init__(config, d_model, mesh, kernels, seed)
        if not config.has_unit_decoder():
            self.unit_rows = ()
        self._seed = seed
        self._tokens = 0
        self._rows: tuple[torch.Tensor, torch.Tensor] | None = None
        """Rows of the batch [B, D] and their squared errors [B], in a step that resamples."""

    def begin_step(self, tokens: int) -> None:
        """See `SparseAutoencoder.begin_step`."""
        super().begin_step(tokens)
        self._tokens = tokens

    def resample(self, skipped: torch.Tensor) -> torch.Tensor | None:
        """See `SparseAutoencoder.resample`."""
        rows, self._rows = self._rows, None
        # Only a step that resamples waits for the device here.
        if rows is None or bool(skipped > 0):
            return None
        return resample_dead(self, *rows, seed=f"{self._seed} resample {self._tokens}")

    def losses(self, x: torch.Tensor) -> Losses:
        """See `PenaltySAE.losses`."""
        latents = self.encode_centred(self.centre(x))
        sizes = latents.sum(0)
        if self.config.has_unit_decoder():
            W_dec = self.unit_decoder()
        else:
            W_dec = self.W_dec
            sizes = sizes * W_dec.norm(dim=1)
        recon = self.decode(latents, W_dec)
        row_errors = (x - self.b_dec - recon).square().sum(1)
        error = row_errors.sum()
        if self.config.resamples_at(self._tokens):
            self._rows = x, row_errors.detach()
        weight = self.penalty_share * self.config.l1_coef / x.numel()
        penalty = weight * self.over_shards(sizes.sum())
        return Losses(latents, error, penalty, {"l1_penalty": penalty.detach()})

    def encode_centred(self, centred: torch.Tensor) -> torch.Tensor:
        """See `PenaltySAE.encode_centred`."""
        return (self.project(centred) + self.b_enc).relu()
