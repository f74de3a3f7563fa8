"""Stochastic rounding to bfloat16: a value goes up or down with odds that keep its mean.

Adam's moments in bfloat16 need it: 8 bits of mantissa cannot hold a change of 0.1% (beta2 = 0.999),
so a moment that is rounded to nearest never changes again. The random bits are a function of
(step, array, global row, column), so that a resumed run, or one on another mesh, rounds alike.
"""

from __future__ import annotations

import torch

ROW, COLUMN, SALT = -1640531527, -2048144789, -1028477379  # odd 32-bit constants
MIX_1, MIX_2 = 2146121005, -2073254261


def salt_of(step: torch.Tensor, array: int) -> torch.Tensor:
    """Scalar int32 that tells updates and arrays apart.

    Args:
        step: scalar, whole number of the update.
        array: number of the rounded array within the update.
    """
    return (step.to(torch.int32) * 8 + array) * SALT


def round_stochastically_(
    target: torch.Tensor, source: torch.Tensor, first_row: int, salt: torch.Tensor
) -> None:
    """Writes `source` to `target`, in place.

    Args:
        target: [n, D] bfloat16.
        source: [n, D] float32; what is not finite stays as it is.
        first_row: global index of row 0.
        salt: of `salt_of`.
    """
    bits = source.contiguous().view(torch.int32)
    rounded = bits + (random_bits(source.shape, first_row, salt, source.device) & 0xFFFF)
    # An exponent of all ones is infinity or NaN; a carry from the mantissa would change it.
    bits = torch.where((bits & 0x7F800000) == 0x7F800000, bits, rounded)
    target.copy_((bits & -0x10000).view(torch.float32))


def random_bits(
    shape: torch.Size, first_row: int, salt: torch.Tensor, device: torch.device
) -> torch.Tensor:
    """[n, D] int32 whose low 16 bits are evenly spread; int32 products wrap."""
    n, width = shape
    # Rows are numbered modulo 2**31; no dictionary has as many.
    rows = torch.arange(first_row, first_row + n, device=device).to(torch.int32)
    columns = torch.arange(width, dtype=torch.int32, device=device)
    mixed = (rows * ROW + salt)[:, None] ^ (columns * COLUMN)
    for constant in (MIX_1, MIX_2):
        mixed = (mixed ^ ((mixed >> 15) & 0x1FFFF)) * constant
    return (mixed >> 16) & 0xFFFF
