"""How programs that hold whole rows of d_model in registers are cut; what every launch sets."""

# Triton has no types.
# mypy: disable-error-code="import-untyped, import-not-found"

from __future__ import annotations

import torch
import triton

from sae_core.errors import ShapeError

FP_FUSION = {"enable_fp_fusion": True}
"""Set at every launch: a product and a sum become one FMA, as they always did. Triton 3.10 turns
its default around, and results may not change with the version of a compiler."""
LARGEST_ROW = 8192
"""Widest d_model: `_MOST_COLUMNS` for every thread of a program of 16 warps, the largest that has
128 registers a thread."""
_MOST_COLUMNS = 16
_USUAL_WARPS = 8


def row_shape(D: int, per_thread: int, in_flight: int) -> dict[str, int]:
    """Compile-time sizes of a program that works on tiles [PAIRS, BD] of whole rows.

    Args:
        D: d_model.
        per_thread: columns that a thread should hold, where at most 8 warps allow it. Few make
            programs large, so that fewer of them share an L1 cache.
        in_flight: numbers of a tile that a thread loads at once. The largest program has half the
            registers for them.

    Raises:
        ShapeError: the row does not fit a program's registers.
    """
    if D > LARGEST_ROW:
        raise ShapeError(
            f"d_model={D}: the triton kernels take at most {LARGEST_ROW}; use kernels=stock"
        )
    BD = max(16, triton.next_power_of_2(D))
    warps = max(1, min(BD // (32 * per_thread), _USUAL_WARPS), BD // (32 * _MOST_COLUMNS))
    if warps > _USUAL_WARPS:
        in_flight //= 2
    pairs = max(1, min(16, in_flight * 32 * warps // BD))
    return {"BD": BD, "PAIRS": pairs, "num_warps": warps, **FP_FUSION}


def plain_rows(matrix: torch.Tensor) -> torch.Tensor:
    """Rows may lie anywhere, a row's columns side by side."""
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()
