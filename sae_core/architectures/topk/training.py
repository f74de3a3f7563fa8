"""TopK SAE with AuxK (Gao et al. 2024, arXiv 2406.04093), one shard of its dictionary per rank.

    x         = (mapped(raw) - input_mean) * input_scale
    pre_acts  = (x - b_dec) @ W_enc.T + b_enc
    latents   = relu(topk(pre_acts, k))          # exact over all shards
    recon     = latents @ W_dec + b_dec
    loss      = |x - recon|^2 / D + auxk_coef * |residual - aux_recon|^2 / |residual|^2

The auxiliary term may be estimated, without bias, from a fixed fraction of the batch's rows.
`mapped` is the map of `sae.input_transform`, by default none. `input_scale` is chosen so that the
calibration sample's mean squared norm is D. The first term of the loss is then the fraction of
variance unexplained. Export folds map and normalisation into the weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.distributed as dist

from sae_core.architectures.base import SparseAutoencoder, StepOutput
from sae_core.architectures.sparse_autoencode import (
    AuxInput,
    Dictionary,
    Normalisation,
    SparsePlan,
    encode_shard,
    fired_latents,
    sparse_autoencode,
)
from sae_core.architectures.topk.settings import TopKConfig, default_auxk
from sae_core.distributed.mesh import Mesh
from sae_core.kernels import Kernels, SparseGradient, subset_of


class TopKSAE(SparseAutoencoder):
    """One rank's shard of a TopK SAE; see `SparseAutoencoder` for the arguments."""

    config: TopKConfig

    def __init__(
        self, config: TopKConfig, d_model: int, mesh: Mesh, kernels: Kernels, seed: int
    ) -> None:
        super().__init__(config, d_model, mesh, kernels, seed)
        auxk = min(config.auxk or default_auxk(d_model), config.n_latents)
        self.plan = SparsePlan(
            kernels, config.n_latents, config.k, auxk, self.first_latent, self.latent_group
        )

    def forward(self, raw: torch.Tensor) -> StepOutput:
        """See `SparseAutoencoder.forward`.

        The metric `auxk_loss` is scaled so that its mean over the data replicas equals its value
        for the global batch.
        """
        weights = Dictionary(self.W_enc, self.b_enc, self.W_dec, self.b_dec)
        raw = self.mapped(raw)
        B = raw.shape[0]
        n_dead = self._n_dead() if self.config.auxk_coef else None
        aux = None if n_dead is None else self._aux_input(B, n_dead)
        normalisation = Normalisation(self.input_mean, self.input_scale)
        out = sparse_autoencode(raw, weights, self.plan, aux, self.copies, normalisation)
        loss = out.squared_error / raw.numel()
        aux_loss = torch.zeros((), device=raw.device)
        if out.aux_squared_error is not None:
            aux_loss = self._aux_loss(out.squared_error.detach(), out.aux_squared_error, B)
            # Without dead latents there is no auxiliary loss, although the path may have run.
            assert n_dead is not None
            aux_loss = torch.where(n_dead > 0, aux_loss, 0.0)
            loss = loss + self.config.auxk_coef * aux_loss
        n_active = (out.active.ends - out.active.offsets).sum()
        fired = fired_latents(out.active, len(self.tokens_since_fired))
        metrics = {"auxk_loss": aux_loss.detach()}
        moments = (out.inputs.total, out.inputs.square)
        return StepOutput(loss, out.squared_error.detach(), fired, n_active, metrics, *moments)

    @torch.no_grad()
    def reconstruct_centred(self, centred: torch.Tensor) -> torch.Tensor:
        """See `SparseAutoencoder.reconstruct_centred`."""
        active = encode_shard(centred, self.W_enc, self.b_enc, self.plan.k, self.plan)
        recon = self.kernels.decode(active, self.W_dec)
        if self.latent_group is not None:
            dist.all_reduce(recon, group=self.latent_group)
        return recon

    def send_gradient_to(self, receive: Callable[[SparseGradient], None]) -> None:
        """See `SparseAutoencoder.send_gradient_to`."""
        self.plan = replace(self.plan, collect=receive)

    def _n_dead(self) -> torch.Tensor:
        """Return the number of dead latents of all shards, a scalar on the device; collective."""
        n_dead = self.dead().sum()
        if self.plan.group is not None:
            dist.all_reduce(n_dead, group=self.plan.group)
        return n_dead

    def _aux_input(self, n_rows: int, n_dead: torch.Tensor) -> AuxInput | None:
        """Return the dead latents and auxiliary rows; None if the auxiliary path need not run.

        With asynchronous kernels it always runs, because the host does not know whether any latent
        is dead. With others it runs if there is a dead latent on any shard.
        """
        if not self.kernels.asynchronous and not bool(n_dead > 0):
            return None
        dead = subset_of(self.dead())
        taken = self._aux_rows(n_rows)
        if taken == n_rows:
            return AuxInput(dead, None)
        # The stream is shuffled, so evenly spaced rows are as good as random ones.
        rows = torch.arange(taken, device=n_dead.device) * n_rows // taken
        return AuxInput(dead, rows)

    def _aux_rows(self, n_rows: int) -> int:
        """Return the number of rows of the auxiliary path."""
        share = self.config.auxk_rows
        return n_rows if share is None else max(1, math.ceil(share * n_rows))

    def _aux_loss(self, residual: torch.Tensor, missing: torch.Tensor, n_rows: int) -> torch.Tensor:
        """Return the fraction of the residual that dead latents leave unexplained.

        The result is scaled so that its mean over the replicas equals its value for the global
        batch.

        Args:
            residual: Scalar, squared error of the main path over this replica's rows.
            missing: Scalar, squared error of the auxiliary path over the auxiliary rows.
            n_rows: Number of rows of this replica.
        """
        # Extrapolate from the auxiliary rows to all rows.
        missing = missing * (n_rows / self._aux_rows(n_rows))
        if self.mesh.n_data > 1:
            residual = residual.clone()
            dist.all_reduce(residual, group=self.mesh.data_group)
            missing = missing * self.mesh.n_data  # because the engine averages over replicas
        # A perfect reconstruction has no residual; its loss is 0, not NaN.
        return torch.where(residual > 0, missing / residual.clamp_min(1e-30), 0.0)
