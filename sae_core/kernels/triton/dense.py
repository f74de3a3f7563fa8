"""Row-by-row work on [B, D] matrices in one pass: centring the inputs, and subtracting.

Inputs are read in the dtype of the raw activations, and normalised in float32 wherever they are
needed, so no float32 copy of them exists. A program works on several rows, and adds up the sums
over rows on the way; the programs' sums are then added in order. There are no atomic additions, so
results are reproducible bit for bit.
"""

# Triton ships no types, and kernel arguments have none that mypy understands.
# mypy: disable-error-code="no-untyped-def, import-untyped, import-not-found"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sae_core.kernels.interface import Affine, Centred, Decoded
from sae_core.kernels.triton.launch import COUNTS, contiguous_columns, row_shape

ROWS = 16
"""Rows per program."""


@triton.jit
def normalised_row(rows, row, stride, mean, scale, columns, inside):
    """Load a row as float32, [BD], and normalise it unless `mean` is None."""
    x = tl.load(rows + row * stride + columns, mask=inside, other=0.0).to(tl.float32)
    if mean is not None:
        x = (x - tl.load(mean + columns, mask=inside, other=0.0)) * tl.load(scale)
    return x


@triton.jit
def target_row(rows, row, stride, mean, scale, shift, columns, inside):
    """Load a row to reconstruct as float32, [BD]; centre it unless `mean` is None."""
    x = normalised_row(rows, row, stride, mean, scale, columns, inside)
    if mean is not None:
        x -= tl.load(shift + columns, mask=inside, other=0.0)
    return x


@triton.jit
def store_sums(totals, squares, total, square, D, columns, inside):
    """Store a program's sum of rows, [BD], and the sum of `square` [BD]; see `empty_sums`."""
    tl.store(totals + tl.program_id(0).to(tl.int64) * D + columns, total, mask=inside)
    tl.store(squares + tl.program_id(0), tl.sum(square, 0))


@triton.jit(do_not_specialize=COUNTS)
def centre_kernel(
    raw, mean, scale, shift, out, totals, squares, B, D, stride, ROWS: tl.constexpr,
    BD: tl.constexpr,
):  # fmt: skip
    """Write centred rows to out, [B, D].

    Also store each program's sum of its normalised rows, [BD], and their squares' sum.
    """
    columns = tl.arange(0, BD)
    inside = columns < D
    total = tl.zeros((BD,), tl.float32)
    square = tl.zeros((BD,), tl.float32)
    first = tl.program_id(0).to(tl.int64) * ROWS
    bias = tl.load(shift + columns, mask=inside, other=0.0)
    for number in range(first, tl.minimum(first + ROWS, B)):
        row = tl.zeros((), tl.int64) + number  # int64 under the interpreter, too
        x = normalised_row(raw, row, stride, mean, scale, columns, inside)
        total += x
        square += x * x
        tl.store(out + row * D + columns, (x - bias).to(out.dtype.element_ty), mask=inside)
    store_sums(totals, squares, total, square, D, columns, inside)


@triton.jit(do_not_specialize=COUNTS)
def subtract_kernel(
    target, mean, scale, shift, recon, error, totals, squares, B, D, target_stride, recon_stride,
    ROWS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Write target - recon to error, [B, D].

    Also store each program's sum of its rows of the error, [BD], and their squares' sum.
    """
    columns = tl.arange(0, BD)
    inside = columns < D
    total = tl.zeros((BD,), tl.float32)
    square = tl.zeros((BD,), tl.float32)
    first = tl.program_id(0).to(tl.int64) * ROWS
    for number in range(first, tl.minimum(first + ROWS, B)):
        row = tl.zeros((), tl.int64) + number  # int64 under the interpreter, too
        x = target_row(target, row, target_stride, mean, scale, shift, columns, inside)
        x -= tl.load(recon + row * recon_stride + columns, mask=inside, other=0.0).to(tl.float32)
        total += x
        square += x * x
        tl.store(error + row * D + columns, x.to(error.dtype.element_ty), mask=inside)
    store_sums(totals, squares, total, square, D, columns, inside)


def dense_shape(D: int) -> dict[str, int]:
    """Return the compile-time sizes of both kernels; see `row_shape`."""
    shape = row_shape(D, per_thread=8, in_flight=32)
    del shape["PAIRS"]
    return {"ROWS": ROWS, **shape}


def empty_sums(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return outputs of `store_sums` for programs of `ROWS` rows each.

    Args:
        rows: [B, D].

    Returns:
        [n_programs, D] and [n_programs] float32. The launch grid is the shape of the latter.
    """
    B, D = rows.shape
    n_programs = triton.cdiv(B, ROWS)
    return (
        torch.empty(n_programs, D, device=rows.device),
        torch.empty(n_programs, device=rows.device),
    )


def target_arguments(
    target: torch.Tensor | Centred,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Return the rows, mean, scale and bias from which kernels compute a target."""
    if isinstance(target, Centred):
        mean, scale, bias = target.affine
        return contiguous_columns(target.raw), mean, scale, bias
    return contiguous_columns(target), None, None, None


def centre(raw: torch.Tensor, affine: Affine, dtype: torch.dtype | None) -> Centred:
    """See `Kernels.centre`.

    Args:
        raw: [B, D].
        affine: What to apply.
        dtype: Dtype of the centred rows; None means float32.
    """
    rows = contiguous_columns(raw)
    B, D = rows.shape
    out = torch.empty(B, D, dtype=dtype or torch.float32, device=raw.device)
    totals, squares = empty_sums(rows)
    if B:
        centre_kernel[squares.shape](
            rows, *affine, out, totals, squares, B, D, rows.stride(0), **dense_shape(D)
        )
    return Centred(out, raw, affine, totals.sum(0), squares.sum())


def subtract(
    target: torch.Tensor | Centred, recon: torch.Tensor, dtype: torch.dtype | None
) -> Decoded:
    """See `Kernels.subtract`.

    Args:
        target: [B, D].
        recon: [B, D].
        dtype: Dtype of the error; None means float32.
    """
    rows, *affine = target_arguments(target)
    recon = contiguous_columns(recon)
    B, D = rows.shape
    error = torch.empty(B, D, dtype=dtype or torch.float32, device=rows.device)
    totals, squares = empty_sums(rows)
    if B:
        subtract_kernel[squares.shape](
            rows, *affine, recon, error, totals, squares, B, D, rows.stride(0), recon.stride(0),
            **dense_shape(D),
        )  # fmt: skip
    return Decoded(error, squares.new_empty(0), squares.sum(), totals.sum(0))
