"""Launch options of all Triton kernels, and sizes of kernels that hold whole rows in registers."""

# Triton ships no types.
# mypy: disable-error-code="import-untyped, import-not-found"

from __future__ import annotations

import torch
import triton

from sae_core.errors import ShapeError

FP_FUSION = {"enable_fp_fusion": True}
"""Options of every launch: fuse a product and a sum into one FMA.

Triton 3.10 changes the default to False. Setting it keeps results independent of Triton's version.
"""
COUNTS = [
    *("n_rows", "n_latents", "first", "stop", "k", "B"),
    *("n_slots", "n_main", "period", "first_latent", "n_side"),
]
"""Arguments of kernels that Triton must not specialise.

By default it compiles another kernel where a number is 1, or a multiple of 16. For these, no such
kernel would be faster, and all of them would have to be compiled and checked.
"""
LARGEST_ROW = 8192
"""Largest supported d_model: `_MOST_COLUMNS` for each thread of a program of 16 warps.

Larger programs would have fewer than 128 registers per thread.
"""
_MOST_COLUMNS = 16
"""Maximum number of columns of a row per thread."""
_USUAL_WARPS = 8
"""Warps per program, unless a row is too wide for them."""


def row_shape(D: int, per_thread: int, in_flight: int) -> dict[str, int]:
    """Return the compile-time sizes of a program that works on tiles [PAIRS, BD] of whole rows.

    Args:
        D: d_model.
        per_thread: Desired columns per thread; more are used if this number would need more than 8
            warps. Fewer columns per thread mean larger programs, so that fewer of them share an L1
            cache.
        in_flight: Elements of a tile that a thread loads at once; halved for programs with more
            than 8 warps, which have half the registers per thread.

    Raises:
        ShapeError: If a row does not fit in a program's registers.
    """
    if D > LARGEST_ROW:
        raise ShapeError(
            f"d_model={D}: the triton kernels support at most {LARGEST_ROW}; "
            "use train.kernels=stock"
        )
    BD = max(16, triton.next_power_of_2(D))
    warps = max(1, min(BD // (32 * per_thread), _USUAL_WARPS), BD // (32 * _MOST_COLUMNS))
    if warps > _USUAL_WARPS:
        in_flight //= 2
    pairs = max(1, min(16, in_flight * 32 * warps // BD))
    return {"BD": BD, "PAIRS": pairs, "num_warps": warps, **FP_FUSION}


def contiguous_columns(matrix: torch.Tensor) -> torch.Tensor:
    """Return the matrix with contiguous columns in each row, copying it only if needed."""
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()
