"""Stochastic rounding to bfloat16: round up or down at random, so that the mean is preserved.

Adam moments in bfloat16 need this. With 8 bits of mantissa, a relative change of 0.1% (beta2 =
0.999) is too small to change the number, so a moment rounded to nearest would stop changing. The
random bits are a function of (step, array, global row, column), so a resumed run, or a run on
another mesh, rounds identically.
"""

from __future__ import annotations

import torch

# Odd 32-bit hash constants.
ROW = -1640531527
COLUMN = -2048144789
SALT = -1028477379
MIX_1 = 2146121005
MIX_2 = -2073254261


def salt_of(step: torch.Tensor, array: int) -> torch.Tensor:
    """Return a scalar int32 salt that differs between updates and between arrays.

    Args:
        step: Scalar, number of the update; a whole number in any dtype.
        array: Index of the rounded array within the update, 0 to 7.
    """
    return (step.to(torch.int32) * 8 + array) * SALT


def round_stochastically_(
    target: torch.Tensor, source: torch.Tensor, first_row: int, salt: torch.Tensor
) -> None:
    """Round `source` stochastically and write it to `target`.

    Args:
        target: [n, D] bfloat16.
        source: [n, D] float32; infinities and NaN are copied unchanged.
        first_row: Global index of row 0.
        salt: As returned by `salt_of`.
    """
    bits = source.contiguous().view(torch.int32)
    rounded = bits + (random_bits(source.shape, first_row, salt, source.device) & 0xFFFF)
    # An exponent of all ones means infinity or NaN, which a carry from the mantissa would alter.
    bits = torch.where((bits & 0x7F800000) == 0x7F800000, bits, rounded)
    target.copy_((bits & -0x10000).view(torch.float32))


def random_bits(
    shape: torch.Size, first_row: int, salt: torch.Tensor, device: torch.device
) -> torch.Tensor:
    """Return uniformly distributed 16-bit numbers, [n, D] int32; int32 products wrap."""
    n, width = shape
    # The cast to int32 is safe: a dictionary has fewer than 2**31 rows.
    rows = torch.arange(first_row, first_row + n, device=device).to(torch.int32)
    columns = torch.arange(width, dtype=torch.int32, device=device)
    mixed = (rows * ROW + salt)[:, None] ^ (columns * COLUMN)
    for constant in (MIX_1, MIX_2):
        mixed = (mixed ^ ((mixed >> 15) & 0x1FFFF)) * constant
    return (mixed >> 16) & 0xFFFF
