"""TopK SAE with AuxK (Gao et al. 2024, arXiv 2406.04093), one shard of its dictionary per rank.

    x         = (raw - input_mean) * input_scale
    pre_acts  = (x - b_dec) @ W_enc.T + b_enc
    latents   = relu(topk(pre_acts, k))          # exact over all shards
    recon     = latents @ W_dec + b_dec
    loss      = |x - recon|^2 / D + auxk_coef * |residual - aux_recon|^2 / |residual|^2

The auxiliary term may be estimated from a fixed share of the batch's rows, without bias.
`input_scale` makes the calibration sample's mean squared norm D, so the first term is the fraction
of variance unexplained. Normalisation is folded into the weights on export.
"""

from __future__ import annotations

import math
from typing import NamedTuple, cast

import torch
import torch.distributed as dist
from torch import nn

from sae_core.autoencode import AuxInput, Dictionary, SparsePlan, sparse_autoencode
from sae_core.config import SAEConfig
from sae_core.initialise import default_auxk, random_unit_rows
from sae_core.kernels import Kernels
from sae_core.mesh import Mesh


class StepOutput(NamedTuple):
    """The loss and what is measured beside it; everything but `loss` is detached."""

    loss: torch.Tensor
    """Scalar; the mean over data replicas is the loss of the global batch."""
    squared_error: torch.Tensor
    """Scalar: summed over this replica's rows and all dimensions, normalised units."""
    aux_loss: torch.Tensor
    """Scalar, before its coefficient; this replica's share times the number of replicas."""
    fired: torch.Tensor
    """[l] bool: local latents that fired on some row of this replica's batch."""
    n_active: torch.Tensor
    """Scalar: local active pairs."""


class TopKSAE(nn.Module):
    """One rank's rows of a TopK SAE.

    Args:
        config: sizes and coefficients.
        d_model: width D of the activations.
        mesh: this rank's place; rows are split over its latent group.
        kernels: the body of the sparse operations.
        seed: fixes the initial dictionary, whatever the number of shards.
    """

    def __init__(
        self, config: SAEConfig, d_model: int, mesh: Mesh, kernels: Kernels, seed: int
    ) -> None:
        super().__init__()
        self.config, self.mesh = config, mesh
        start, stop = mesh.rows(config.n_latents)
        auxk = min(config.auxk or default_auxk(d_model), config.n_latents)
        group = mesh.latent_group if mesh.n_latent > 1 else None
        self.plan = SparsePlan(kernels, config.n_latents, config.k, auxk, start, group)

        W_dec = random_unit_rows(start, stop, d_model, seed)
        self.W_enc = nn.Parameter(W_dec.clone())  # tied at initialisation: keeps latents alive
        self.b_enc = nn.Parameter(torch.zeros(stop - start))
        self.W_dec = nn.Parameter(W_dec)
        self.b_dec = nn.Parameter(torch.zeros(d_model))
        for parameter in (self.W_enc, self.b_enc, self.W_dec):
            # DeepSpeed's mark for a shard: without it the norms of other shards are left out.
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
        """W_enc and W_dec in the kernels' dtype, where they want copies."""
        if self.W_enc_copy is None or self.W_dec_copy is None:
            return None
        return self.W_enc_copy, self.W_dec_copy

    @torch.no_grad()
    def refresh_copies(self) -> None:
        """Brings the copies up to date with the masters, after somebody set those."""
        if self.copies is not None:
            for copy, master in zip(self.copies, (self.W_enc, self.W_dec), strict=True):
                copy.copy_(master)

    def normalise(self, raw: torch.Tensor) -> torch.Tensor:
        """[B, D] raw activations of any float dtype to float32 with unit mean square."""
        return (raw.float() - self.input_mean) * self.input_scale

    def forward(self, raw: torch.Tensor) -> StepOutput:
        """Loss on this replica's rows; a collective call over the latent and data groups.

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
        """[l] bool: local latents that have not fired for `dead_after_tokens`."""
        return self.tokens_since_fired >= self.config.dead_after_tokens

    def _aux_input(self, n_rows: int) -> AuxInput | None:
        """Local dead latents and the rows they are tried on; None when no rank has any."""
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
        # Evenly spaced: the stream is shuffled, so these are as good as drawn ones.
        return AuxInput(dead, torch.arange(taken, device=dead.device) * n_rows // taken)

    def _aux_rows(self, n_rows: int) -> int:
        return max(1, math.ceil(self.config.auxk_rows * n_rows))

    def _aux_loss(self, residual: torch.Tensor, missing: torch.Tensor, n_rows: int) -> torch.Tensor:
        """Share of the residual that dead latents leave unexplained, over all replicas' rows.

        Args:
            residual: scalar, squared error of the main path over this replica's rows.
            missing: scalar, what the dead latents leave of it on the auxiliary rows.
            n_rows: rows of this replica.
        """
        missing = missing * (n_rows / self._aux_rows(n_rows))
        if self.mesh.n_data > 1:
            residual = residual.clone()
            dist.all_reduce(residual, group=self.mesh.data_group)
            missing = missing * self.mesh.n_data  # the engine averages over replicas
        # A perfect reconstruction leaves no residual to explain.
        return torch.where(residual > 0, missing / residual.clamp_min(1e-30), 0.0)

    @torch.no_grad()
    def note_fired(self, fired: torch.Tensor, batch_tokens: int, skipped: torch.Tensor) -> None:
        """Ages `tokens_since_fired` by one global batch; a collective call over the data group.

        Args:
            fired: [l] bool, of this replica.
            batch_tokens: rows of the global batch.
            skipped: scalar, 1 when the update was not made; then nothing changes.
        """
        anywhere = fired.to(torch.uint8)
        if self.mesh.n_data > 1:
            dist.all_reduce(anywhere, op=dist.ReduceOp.MAX, group=self.mesh.data_group)
        aged = torch.where(anywhere > 0, 0, self.tokens_since_fired + batch_tokens)
        self.tokens_since_fired = torch.where(skipped > 0, self.tokens_since_fired, aged)


class _Sharded(nn.Parameter):
    tensor_model_parallel: bool
