"""Initialisation of an SAE from a sample: input normalisation, decoder bias, encoder.

This follows Gao et al. 2024 (arXiv 2406.04093, appendix A). Decoder rows are random with unit norm,
and the encoder starts as a copy of the decoder. The decoder bias is the geometric median of a
sample. Then the architecture initialises its encoder (`SparseAutoencoder.calibrate_encoder`).
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from sae_core.architectures.base import SparseAutoencoder
from sae_core.errors import ShapeError

_ENCODER_ROWS = 4096
"""Maximum number of sample rows used to initialise the encoder."""
_MEDIAN_STEPS = 100
"""Maximum number of iterations for the geometric median."""


def geometric_median(x: torch.Tensor, tolerance: float = 1e-5) -> torch.Tensor:
    """Return the point with the smallest sum of distances to the rows of x (Weiszfeld's algorithm).

    Args:
        x: [N, D] rows.
        tolerance: Stop when a step moves the point by less than this fraction of its norm.

    Returns:
        [D] the geometric median.
    """
    point = x.mean(0)
    for _ in range(_MEDIAN_STEPS):
        weights = 1 / (x - point).norm(dim=1).clamp_min(1e-8)
        moved = (weights[:, None] * x).sum(0) / weights.sum()
        done = (moved - point).norm() <= tolerance * moved.norm().clamp_min(1e-8)
        point = moved
        if done:
            break
    return point


@torch.no_grad()
def calibrate(sae: SparseAutoencoder, sample: torch.Tensor) -> None:
    """Set the input mean and scale and the decoder bias, and initialise the encoder; collective.

    Args:
        sae: A newly built shard.
        sample: [N, D] raw activations, the same on every rank.

    Raises:
        ShapeError: If the sample has the wrong width or fewer than two rows, is not finite, or has
            zero variance.
    """
    d_model = sae.d_model
    if sample.ndim != 2 or sample.shape[1] != d_model or len(sample) < 2:
        raise ShapeError(
            f"calibration sample has shape {tuple(sample.shape)}: expected "
            f"[2 or more, {d_model}]; check d_model and the number of stored activations"
        )
    raw = sample.float()
    mean = raw.mean(0)
    power = (raw - mean).square().sum(1).mean()
    if not bool(torch.isfinite(power)) or bool(power <= 0):
        raise ShapeError(
            f"calibration sample has variance {float(power)}: expected a finite number above 0; "
            "check the stored activations with stage=verify"
        )
    sae.input_mean.copy_(mean)
    sae.input_scale.copy_((d_model / power).sqrt())
    x = sae.normalise(raw)
    sae.b_dec.copy_(geometric_median(x))
    # All ranks use rank 0's values: rounding differences would otherwise make replicas diverge.
    for tensor in (sae.input_mean, sae.input_scale, sae.b_dec):
        dist.broadcast(tensor, src=0)
    sae.calibrate_encoder(x[:_ENCODER_ROWS])
