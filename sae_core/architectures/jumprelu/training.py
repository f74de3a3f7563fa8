"""JumpReLU SAE (Rajamanoharan et al. 2024, arXiv 2407.14435), one shard per rank.

    x         = (mapped(raw) - input_mean) * input_scale
    pre_acts  = (x - b_dec) @ W_enc.T + b_enc
    latents   = pre_acts * H(pre_acts - threshold)        # H: Heaviside step; threshold > 0
    recon     = latents @ W_dec + b_dec
    loss      = |x - recon|^2 / D + share * l0_coef * L0
    L0        = number of active latents, sum of H(pre_acts - threshold)

With `l0_target`, the last term is `share * l0_coef * (L0 / l0_target - 1)^2` (Gemma Scope 2).
`share` grows from 0 to 1 in the warm-up. H has no gradient with respect to the threshold, so that
of the expected loss is estimated with a rectangle kernel (equations 11 and 12 of the paper):

    dL0/dthreshold      = - rect((pre_acts - threshold) / bandwidth) / bandwidth
    dlatents/dthreshold = - threshold * rect((pre_acts - threshold) / bandwidth) / bandwidth

where rect(u) is 1 for |u| < 1/2 and else 0. As in the paper, L0 has no gradient with respect to
pre_acts, and thresholds are trained as their logarithms. Unlike there, they start at a value from
the data; see `JumpReLUSAE.calibrate_encoder`.

Memory: see `sae_core.architectures.penalty.training`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from sae_core.architectures.base import StepOutput
from sae_core.architectures.jumprelu.settings import JumpReLUConfig
from sae_core.architectures.penalty.training import Losses, PenaltySAE
from sae_core.distributed.mesh import Mesh
from sae_core.kernels import Kernels

_LEAST_THRESHOLD = 1e-4
"""Smallest threshold at the start. The logarithm could not leave 0."""
_QUANTILE_ELEMENTS = 1 << 24
"""Most pre-activations that are sorted at a time."""


class JumpReLUSAE(PenaltySAE):
    """One rank's shard of a JumpReLU SAE; see `SparseAutoencoder` for the arguments.

    `log_threshold` [l] is trained; the buffer `threshold` [l] is its exponential after every step,
    for inference. Both are in units of the normalised inputs.
    """

    config: JumpReLUConfig

    def __init__(
        self, config: JumpReLUConfig, d_model: int, mesh: Mesh, kernels: Kernels, seed: int
    ) -> None:
        super().__init__(config, d_model, mesh, kernels, seed)
        self.log_threshold = self.add_rows("log_threshold", torch.zeros_like(self.b_enc))
        self.threshold: torch.Tensor
        self.register_buffer("threshold", torch.ones_like(self.b_enc.detach()))
        self.row_names.add("threshold")

    def losses(self, x: torch.Tensor) -> Losses:
        """See `PenaltySAE.losses`."""
        pre_acts = self.project(self.centre(x)) + self.b_enc
        threshold = self.log_threshold.exp()
        latents = jumprelu(pre_acts, threshold, self.config.bandwidth)
        recon = self.decode(latents, self.unit_decoder())
        error = (x - self.b_dec - recon).square().sum()
        is_active = step_function(pre_acts, threshold, self.config.bandwidth)
        l0 = self.over_shards(is_active.sum() / len(x))
        penalty = self.penalty_share * self._penalty(l0)
        return Losses(latents, error, penalty, {"l0_penalty": penalty.detach()})

    def _penalty(self, l0: torch.Tensor) -> torch.Tensor:
        """Return the penalty on the L0 of this replica's rows.

        Its gradient, averaged over the replicas, is that of the penalty on the global batch.
        """
        target = self.config.l0_target
        if target is None:
            return self.config.l0_coef * l0
        if self.mesh.n_data > 1:
            # The square of the mean over replicas is not the mean of the squares.
            total = l0.detach().clone()
            dist.all_reduce(total, group=self.mesh.data_group)
            l0 = total / self.mesh.n_data + (l0 - l0.detach())
        return self.config.l0_coef * (l0 / target - 1).square()

    def encode_centred(self, centred: torch.Tensor) -> torch.Tensor:
        """See `PenaltySAE.encode_centred`."""
        pre_acts = self.project(centred) + self.b_enc
        return pre_acts * (pre_acts > self.log_threshold.exp())

    @torch.no_grad()
    def calibrate_encoder(self, x: torch.Tensor) -> None:
        """Set thresholds from a sample, then scale encoder and thresholds by least squares.

        Every latent is active on the same fraction of the sample, `initial_l0 / n_latents`. With
        the constant of the paper, half of the latents are active at first, and the encoder has to
        grow while the thresholds rise.

        Args:
            x: [N, D] normalised rows, the same on all ranks.
        """
        centred = x - self.b_dec
        share = min(1.0, self.config.initial_l0 / self.config.n_latents)
        threshold = torch.empty_like(self.threshold)
        step = max(1, _QUANTILE_ELEMENTS // len(x))
        n_active = min(len(x) - 1, max(1, round(share * len(x))))
        for start in range(0, len(threshold), step):
            own = slice(start, start + step)
            pre_acts = centred @ self.W_enc[own].T + self.b_enc[own]
            largest = pre_acts.topk(n_active + 1, dim=0).values
            # Halfway between two values, so that rounding does not decide whether one passes.
            threshold[own] = (largest[-2] + largest[-1]) / 2
        # All ranks of a data group must have the same values; see `SparseAutoencoder`.
        if self.mesh.n_data > 1:
            dist.broadcast(threshold, group=self.mesh.data_group, group_src=0)
        self.threshold.copy_(threshold)
        self.weights_replaced()
        super().calibrate_encoder(x)

    @torch.no_grad()
    def scale_encoder(self, scale: torch.Tensor) -> None:
        """See `SparseAutoencoder.scale_encoder`."""
        super().scale_encoder(scale)
        self.threshold.mul_(scale)
        self.weights_replaced()

    @torch.no_grad()
    def after_update(self, out: StepOutput, skipped: torch.Tensor) -> None:
        """See `SparseAutoencoder.after_update`."""
        self.threshold.copy_(self.log_threshold.exp())  # unchanged if the update was skipped

    @torch.no_grad()
    def weights_replaced(self) -> None:
        """See `SparseAutoencoder.weights_replaced`."""
        self.log_threshold.copy_(self.threshold.clamp_min(_LEAST_THRESHOLD).log())
        self.threshold.copy_(self.log_threshold.exp())


def step_function(
    pre_acts: torch.Tensor, threshold: torch.Tensor, bandwidth: float
) -> torch.Tensor:
    """Return 1 where `pre_acts > threshold`, else 0, with the kernel estimate of its gradient.

    Args:
        pre_acts: [B, l]; gets no gradient.
        threshold: [l]; gets `-rect((pre_acts - threshold) / bandwidth) / bandwidth`.
        bandwidth: Width of the kernel.

    Returns:
        [B, l] float32.
    """
    out: torch.Tensor = _Step.apply(pre_acts, threshold, bandwidth)
    return out


def jumprelu(pre_acts: torch.Tensor, threshold: torch.Tensor, bandwidth: float) -> torch.Tensor:
    """Return `pre_acts` where it is above the threshold, else 0.

    Args:
        pre_acts: [B, l]; gets the gradient of the active latents.
        threshold: [l]; gets `-threshold * rect((pre_acts - threshold) / bandwidth) / bandwidth`.
        bandwidth: Width of the kernel.

    Returns:
        [B, l] float32.
    """
    out: torch.Tensor = _JumpReLU.apply(pre_acts, threshold, bandwidth)
    return out


def _near(pre_acts: torch.Tensor, threshold: torch.Tensor, bandwidth: float) -> torch.Tensor:
    """Return True where the rectangle kernel is not 0, [B, l]."""
    return (pre_acts - threshold).abs() < bandwidth / 2


class _Step(torch.autograd.Function):
    """See `step_function`."""

    @staticmethod
    def forward(
        ctx: Any, pre_acts: torch.Tensor, threshold: torch.Tensor, bandwidth: float
    ) -> torch.Tensor:
        ctx.save_for_backward(_near(pre_acts, threshold, bandwidth))
        ctx.bandwidth = bandwidth
        return (pre_acts > threshold).float()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[None, torch.Tensor, None]:
        (near,) = ctx.saved_tensors
        return None, (gradient * near).sum(0) / -ctx.bandwidth, None


class _JumpReLU(torch.autograd.Function):
    """See `jumprelu`."""

    @staticmethod
    def forward(
        ctx: Any, pre_acts: torch.Tensor, threshold: torch.Tensor, bandwidth: float
    ) -> torch.Tensor:
        is_active = pre_acts > threshold
        ctx.save_for_backward(is_active, _near(pre_acts, threshold, bandwidth), threshold)
        ctx.bandwidth = bandwidth
        return pre_acts * is_active

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        is_active, near, threshold = ctx.saved_tensors
        through_threshold = (gradient * near).sum(0) * (threshold / -ctx.bandwidth)
        return gradient * is_active, through_threshold, None
