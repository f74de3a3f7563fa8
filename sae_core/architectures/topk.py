"""TopK SAE with AuxK (Gao et al. 2024, arXiv 2406.04093), one shard of its dictionary per rank.

    x         = (raw - input_mean) * input_scale
    pre_acts  = (x - b_dec) @ W_enc.T + b_enc
    latents   = relu(topk(pre_acts, k))          # exact over all shards
    recon     = latents @ W_dec + b_dec
    loss      = |x - recon|^2 / D + auxk_coef * |residual - aux_recon|^2 / |residual|^2

The auxiliary term may be estimated, without bias, from a fixed fraction of the batch's rows.
`input_scale` is chosen so that the calibration sample's mean squared norm is D; the first term of
the loss is then the fraction of variance unexplained. Export folds the normalisation into the
weights.
"""

from __future__ import annotations

import math
from typing import cast

import torch
import torch.distributed as dist
from torch import nn

from sae_core.architectures.base import StepOutput
from sae_core.architectures.dictionary_init import default_auxk, random_unit_rows
from sae_core.architectures.sparse_autoencode import (
    AuxInput,
    Dictionary,
    SparsePlan,
    sparse_autoencode,
)
from sae_core.config import SAEConfig
from sae_core.distributed.mesh import Mesh
from sae_core.kernels import Kernels


class TopKSAE(nn.Module):
    """One rank's shard of a TopK SAE, with l of its L dictionary rows.

    Args:
        config: sizes and coefficients.
        d_model: width D of the activations.
        mesh: this rank's position; dictionary rows are split over its latent group.
        kernels: implementation of the sparse operations.
        seed: seed of the initial dictionary, which does not depend on the number of shards.
    """

    def __init__(
        self, config: SAEConfig, d_model: int, mesh: Mesh, kernels: Kernels, seed: int
    ) -> None:
        super().__init__()
        self.config = config
        self.mesh = mesh
        start, stop = mesh.rows(config.n_latents)
        auxk = min(config.auxk or default_auxk(d_model), config.n_latents)
        group = mesh.latent_group if mesh.n_latent > 1 else None
        self.plan = SparsePlan(kernels, config.n_latents, config.k, auxk, start, group)

        W_dec = random_unit_rows(start, stop, d_model, seed)
        self.W_enc = nn.Parameter(
            W_dec.clone()
        )  # tied at initialisation, which keeps latents alive
        self.b_enc = nn.Parameter(torch.zeros(stop - start))
        self.W_dec = nn.Parameter(W_dec)
        self.b_dec = nn.Parameter(torch.zeros(d_model))
        for parameter in (self.W_enc, self.b_enc, self.W_dec):
            # Marks a shard for DeepSpeed, which would otherwise leave other shards out of norms.
            cast("_Sharded", parameter).tensor_model_parallel = True
        self.input_mean: torch.Tensor
        self.input_scale: torch.Tensor
        self.tokens_since_fired: torch.Tensor
        self.register_buffer("input_mean", torch.zeros(d_model))
        self.register_buffer("input_scale", torch.ones(()))
        self.register_buffer("tokens_since_fired", torch.zeros(stop - start, dtype=torch.int64))

        self.W_enc_copy: torch.Tensor | None
        self.W_dec_copy: torch.Tensor | None
        for name in ("W_enc", "W_dec"):
            copy = None
            if kernels.copy_dtype is not None:
                copy = getattr(self, name).detach().to(kernels.copy_dtype)
            self.register_buffer(f"{name}_copy", copy, persistent=False)

    @property
    def copies(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """W_enc and W_dec in `Kernels.copy_dtype`; None if the kernels use no copies."""
        if self.W_enc_copy is None or self.W_dec_copy is None:
            return None
        return self.W_enc_copy, self.W_dec_copy

    @torch.no_grad()
    def refresh_copies(self) -> None:
        """Update the copies after the master weights were changed from outside."""
        if self.copies is not None:
            for copy, master in zip(self.copies, (self.W_enc, self.W_dec), strict=True):
                copy.copy_(master)

    def normalise(self, raw: torch.Tensor) -> torch.Tensor:
        """Normalise raw activations, [B, D] in any float dtype, to float32 of unit mean square."""
        return (raw.float() - self.input_mean) * self.input_scale

    def forward(self, raw: torch.Tensor) -> StepOutput:
        """Compute the loss on this replica's rows; collective over the latent and data groups.

        Args:
            raw: [B, D] raw activations, the same on all ranks of the latent group.
        """
        x = self.normalise(raw)
        weights = Dictionary(self.W_enc, self.b_enc, self.W_dec, self.b_dec)
        aux = self._aux_input(x.shape[0])
        out = sparse_autoencode(x, weights, self.plan, aux, self.copies)
        loss = out.squared_error / x.numel()
        aux_loss = torch.zeros((), device=x.device)
        if out.aux_squared_error is not None:
            aux_loss = self._aux_loss(out.squared_error.detach(), out.aux_squared_error, x.shape[0])
            loss = loss + self.config.auxk_coef * aux_loss
        fired = torch.zeros_like(self.tokens_since_fired, dtype=torch.bool)
        fired[out.active.latents] = True
        n_active = torch.tensor(len(out.active.latents), device=x.device)
        return StepOutput(loss, out.squared_error.detach(), aux_loss.detach(), fired, n_active)

    def dead(self) -> torch.Tensor:
        """Return the local latents that have not fired for `dead_after_tokens` tokens, [l] bool."""
        return self.tokens_since_fired >= self.config.dead_after_tokens

    def _aux_input(self, n_rows: int) -> AuxInput | None:
        """Return the dead latents and the rows of the auxiliary path; None if no rank has any."""
        if self.config.auxk_coef == 0:
            return None
        dead = self.dead().nonzero().squeeze(1)
        total = torch.tensor(len(dead), device=dead.device)
        if self.plan.group is not None:
            dist.all_reduce(total, group=self.plan.group)
        if not bool(total > 0):
            return None
        taken = self._aux_rows(n_rows)
        if taken == n_rows:
            return AuxInput(dead, None)
        # The stream is shuffled, so evenly spaced rows are as good as random ones.
        return AuxInput(dead, torch.arange(taken, device=dead.device) * n_rows // taken)

    def _aux_rows(self, n_rows: int) -> int:
        """Return the number of rows of the auxiliary path."""
        return max(1, math.ceil(self.config.auxk_rows * n_rows))

    def _aux_loss(self, residual: torch.Tensor, missing: torch.Tensor, n_rows: int) -> torch.Tensor:
        """Return the fraction of the residual that dead latents leave unexplained.

        The result is scaled so that its mean over the replicas is that of the global batch.

        Args:
            residual: scalar, squared error of the main path over this replica's rows.
            missing: scalar, squared error of the auxiliary path over the auxiliary rows.
            n_rows: number of rows of this replica.
        """
        # Extrapolate from the auxiliary rows to all rows.
        missing = missing * (n_rows / self._aux_rows(n_rows))
        if self.mesh.n_data > 1:
            residual = residual.clone()
            dist.all_reduce(residual, group=self.mesh.data_group)
            missing = missing * self.mesh.n_data  # because the engine averages over replicas
        # A perfect reconstruction has no residual; its loss is 0, not NaN.
        return torch.where(residual > 0, missing / residual.clamp_min(1e-30), 0.0)

    @torch.no_grad()
    def update_tokens_since_fired(
        self, fired: torch.Tensor, batch_tokens: int, skipped: torch.Tensor
    ) -> None:
        """Update `tokens_since_fired` after one global batch; collective over the data group.

        Args:
            fired: [l] bool, latents that fired on this replica.
            batch_tokens: number of tokens in the global batch.
            skipped: scalar, 1 if the update was skipped; nothing changes then.
        """
        anywhere = fired.to(torch.uint8)
        if self.mesh.n_data > 1:
            dist.all_reduce(anywhere, op=dist.ReduceOp.MAX, group=self.mesh.data_group)
        aged = torch.where(anywhere > 0, 0, self.tokens_since_fired + batch_tokens)
        self.tokens_since_fired = torch.where(skipped > 0, self.tokens_since_fired, aged)


class _Sharded(nn.Parameter):
    """Type of a parameter with DeepSpeed's mark for shards."""

    tensor_model_parallel: bool
