"""Linear maps that equalise the variance of the input channels, and when to propose one.

A few channels with far more variance than the others, as in attention outputs, hold most of the
squared error that training minimises. The dictionary then describes little else, and many of its
latents never fire on new rows.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from sae_core.errors import ShapeError

LOUD_SHARE = 0.05
"""Share of the channels whose part of the variance `InputReport` gives."""
DOMINATED = 0.5
"""Part of the variance in those channels above which a transform is proposed."""
_LEAST_STD = 1e-3
"""Smallest standard deviation of a channel by which it is divided, as a fraction of the root mean
square over the channels. Constant channels would otherwise become rounding noise."""
_ROWS_PER_BLOCK = 8192


class InputReport(NamedTuple):
    """Differences between the channels of a sample, which decide whether a transform helps."""

    mean_to_spread: float
    """Norm of the mean row, divided by the root mean square distance of the rows from it."""
    loud_variance: float
    """Part of the variance in the 5% of the channels with the most variance, rounded up."""
    loudest_to_median: float
    """Largest standard deviation of a channel, divided by that of the median channel."""

    def proposal(self, transform: str) -> str | None:
        """Return a sentence that proposes another `sae.input_transform`; None if not needed.

        Args:
            transform: The transform in use.
        """
        if transform not in ("scale", "center") or self.loud_variance < DOMINATED:
            return None
        return (
            f"the {LOUD_SHARE:.0%} of the channels with the most variance hold "
            f"{self.loud_variance:.0%} of it, and therefore dominate the loss; "
            "sae.input_transform=per_channel (or whiten) gives all channels the same variance"
        )

    def __str__(self) -> str:
        return (
            f"norm of the mean {self.mean_to_spread:.3g} times the spread; top {LOUD_SHARE:.0%} of "
            f"the channels: {self.loud_variance:.0%} of the variance; largest standard deviation "
            f"{self.loudest_to_median:.3g} times the median one"
        )


def report_of(sample: torch.Tensor) -> InputReport:
    """Measure the channels of a sample.

    Args:
        sample: [N, D] raw activations.
    """
    rows = sample.double()
    mean, variance = rows.mean(0), rows.var(0, correction=0)
    total = variance.sum()
    n_loud = math.ceil(LOUD_SHARE * sample.shape[1])
    loudest = variance.sort(descending=True).values
    middle = loudest.median()
    numbers = [
        mean.norm() / total.sqrt(),
        loudest[:n_loud].sum() / total,
        (loudest[0] / middle.clamp_min(torch.finfo(torch.float64).tiny)).sqrt(),
    ]
    return InputReport(*torch.stack(numbers).tolist())


def channel_scales(sample: torch.Tensor) -> torch.Tensor:
    """Return the factors that give every channel of a sample unit variance, [D] float32.

    Args:
        sample: [N, D] raw activations.
    """
    std = sample.double().std(0, correction=0)
    least = _LEAST_STD * std.square().mean().sqrt()
    return (1 / std.clamp_min(least)).float()


def whitening(sample: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Return the symmetric map that gives a sample's rows unit covariance, [D, D] float32.

    This is ZCA whitening, (C + epsilon * mean eigenvalue of C)^(-1/2) for the covariance C. Of all
    whitening maps it changes the rows least. Whitened inputs improve several measures of SAEs
    (arXiv 2511.13981).

    Args:
        sample: [N, D] raw activations.
        epsilon: Bound of the amplification, relative to the mean eigenvalue. Directions with far
            less variance than that would otherwise become noise of unit variance.

    Raises:
        ShapeError: If the sample has fewer rows than channels.
    """
    n_rows, d_model = sample.shape
    if n_rows < d_model:
        raise ShapeError(
            f"calibration sample has {n_rows} rows: expected at least {d_model}, the number of "
            "channels, for sae.input_transform=whiten; raise train.sample_tokens"
        )
    mean = sample.double().mean(0)
    covariance = mean.new_zeros(d_model, d_model)
    for rows in sample.split(_ROWS_PER_BLOCK):
        centred = rows.double() - mean
        covariance += centred.T @ centred
    values, vectors = torch.linalg.eigh(covariance / n_rows)
    values = values.clamp_min(0.0)
    factors = (values + epsilon * values.mean()).rsqrt()
    found = (vectors * factors) @ vectors.T
    return ((found + found.T) / 2).float()
