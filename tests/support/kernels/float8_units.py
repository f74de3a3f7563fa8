"""Emulate the sums of Hopper's float8 units, by the model in `prefilter_float8`."""

from __future__ import annotations

import torch

from sae_core.kernels.triton.prefilter_float8 import PROMOTED, SUM_WIDTH, SplitRows

FRACTION_BITS = 13


def float8_product(x: torch.Tensor, W: torch.Tensor) -> torch.Tensor:
    """Return `x @ W.T` as float8 units compute it, [B, L] float64.

    Args:
        x: [B, D] float8 numbers.
        W: [L, D] float8 numbers.
    """
    x, W = x.double(), W.double()
    total = torch.zeros(len(x), len(W))
    for start in range(0, x.shape[1], PROMOTED):
        running = torch.zeros(len(x), len(W), dtype=torch.float64)
        for first in range(start, min(start + PROMOTED, x.shape[1]), SUM_WIDTH):
            columns = slice(first, min(first + SUM_WIDTH, start + PROMOTED))
            running = _step(running, x[:, columns], W[:, columns])
        total += running.float()
    return total.double()


def truncated_product(x: SplitRows, W: SplitRows) -> torch.Tensor:
    """Return the product of split rows with float8 sums truncated, [B, L] float64."""
    product = float8_product(x.low, W.low) + x.side.double() @ W.side.double().T
    return product * x.scales.double()[:, None] * W.scales.double()


def _step(running: torch.Tensor, x: torch.Tensor, W: torch.Tensor) -> torch.Tensor:
    """Add one step's products to the running sums [B, L]."""
    products = x[:, None, :] * W[None, :, :]
    exponents = _exponent(x)[:, None, :] + _exponent(W)[None, :, :]
    exponents = torch.where(products == 0, -1000, exponents).amax(2)
    exponents = torch.maximum(exponents, torch.where(running == 0, -1000, _exponent_of(running)))
    unit = torch.exp2((exponents - FRACTION_BITS).clamp_min(-900).double())
    kept = (products / unit[:, :, None]).trunc().sum(2) + (running / unit).trunc()
    return _truncate(kept * unit)


def _truncate(value: torch.Tensor) -> torch.Tensor:
    """Keep 13 fraction bits of a sum."""
    unit = torch.exp2((_exponent_of(value) - FRACTION_BITS).double())
    return (value / unit).trunc() * unit


def _exponent(numbers: torch.Tensor) -> torch.Tensor:
    """Return the exponents of float8 numbers; subnormal ones have the smallest normal exponent."""
    return _exponent_of(numbers).clamp_min(-6)


def _exponent_of(numbers: torch.Tensor) -> torch.Tensor:
    """Return the power of two of the leading bit; zeros have a very small one."""
    exponents = torch.frexp(numbers).exponent - 1
    return torch.where(numbers == 0, -900, exponents)
