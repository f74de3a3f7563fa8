"""Initialisation of an SAE from a sample: input normalisation, decoder bias, encoder.

This follows Gao et al. 2024 (arXiv 2406.04093, appendix A). Decoder rows are random with unit norm,
and the encoder starts as a copy of the decoder. The decoder bias is the geometric median of a
sample. Then the architecture initialises its encoder (`SparseAutoencoder.calibrate_encoder`).
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist

from sae_core.architectures.base import SparseAutoencoder
from sae_core.errors import ShapeError
from sae_core.training.input_transform import channel_scales, whitening

_ENCODER_ROWS = 4096
"""Maximum number of sample rows used to initialise the encoder."""
_LEAST_SPREAD = 1e-10
"""Variance, relative to the mean square, up to which rows may differ by rounding only."""
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
        ShapeError: If the sample has the wrong width or fewer than two rows, is not finite, or if
            all rows are equal up to rounding.
    """
    d_model = sae.d_model
    if sample.ndim != 2 or sample.shape[1] != d_model or len(sample) < 2:
        raise ShapeError(
            f"calibration sample has shape {tuple(sample.shape)}: expected "
            f"[2 or more, {d_model}]; check d_model and the number of stored activations"
        )
    raw = sample.float()
    _require_spread(raw)
    _fit_map(sae, raw)
    mapped = sae.mapped(raw)
    mean = mapped.mean(0)
    sae.input_mean.copy_(mean)
    if sae.config.input_transform != "center":
        power = (mapped - mean).square().sum(1).mean()
        sae.input_scale.copy_((d_model / power).sqrt())
    x = sae.normalise(raw)
    sae.b_dec.copy_(geometric_median(x))
    # All ranks use rank 0's values: rounding differences would otherwise make replicas diverge.
    for tensor in (sae.input_mean, sae.input_scale, sae.b_dec):
        dist.broadcast(tensor, src=0)
    sae.calibrate_encoder(x[:_ENCODER_ROWS])


def _require_spread(raw: torch.Tensor) -> None:
    """Check that the rows [N, D] are finite and not all equal.

    Raises:
        ShapeError: If they are not finite, or are equal up to rounding.
    """
    power = (raw - raw.mean(0)).square().sum(1).mean()
    mean_square = raw.square().sum(1).mean()
    variance, square = torch.stack([power, mean_square]).tolist()  # a single host sync
    least_variance = _LEAST_SPREAD * square
    if not math.isfinite(variance) or variance <= least_variance:
        raise ShapeError(
            f"calibration sample has variance {variance:.3g}: expected a finite number above "
            f"{least_variance:.3g}, the level of rounding errors; check the stored "
            "activations; stage=verify finds values that are not finite"
        )


def _fit_map(sae: SparseAutoencoder, raw: torch.Tensor) -> None:
    """Fit the map of `sae.input_transform` to a sample, the same on all ranks; collective.

    Args:
        sae: The shard.
        raw: [N, D] float32 raw activations.
    """
    if sae.input_map is None:
        return
    sae.input_center.copy_(raw.double().mean(0))
    if sae.input_map.ndim == 1:
        sae.input_map.copy_(channel_scales(raw))
    else:
        sae.input_map.copy_(whitening(raw, sae.config.whiten_epsilon))
    for tensor in (sae.input_center, sae.input_map):
        dist.broadcast(tensor, src=0)
