"""Part `exact`: all candidates of the encoder give the same bits, and the right ones."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.gpu.encoders import candidates, product_name, products, topk_call
from benchmarks.gpu.part import Context, Row, error_text, work_row
from benchmarks.step.work import Work
from sae_core.kernels.triton.quantise import FP8

_Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""x [B, D], W [L, D] and b [L]."""
_SUM_ERROR = 2.0**-16
"""Allowed error of a sum, relative to |x| |w|. Sums of float32 stay well below it."""
_TF32 = 2.0**-9
"""Allowed error of a tf32 product: both inputs are rounded to 10 bits."""


def run(context: Context) -> str:
    """Compare the candidates bit by bit, and the first one with float64."""
    equal: list[bool] = []
    for work in context.shapes.exact:
        inputs = _inputs(context, work)
        for dtype, precision in products(context.interpreted, context.setup.has_float8):
            equal += _compare(context, work, inputs, dtype, precision)
    return f"{sum(equal)} of {len(equal)} candidates have the bits of the default"


def _compare(
    context: Context, work: Work, inputs: _Inputs, dtype: torch.dtype, precision: str
) -> Iterator[bool]:
    """Yield for each candidate but the first whether its bits are those of the first."""
    x, W, b = inputs
    name = product_name(dtype, precision)
    first: tuple[str, torch.Tensor, torch.Tensor] | None = None
    for candidate, encoder in candidates(dtype, precision, context.interpreted).items():
        if not context.budget.left_s():
            return
        row = {"work": work_row(context, work), "product": name, "candidate": candidate}
        try:
            values, latents = topk_call(encoder, x, W, b, work.k)()
            context.setup.synchronize()
        except Exception as error:  # one candidate that does not run must not hide the others
            context.report("candidate runs", **row, error=error_text(error), passed=False)
            continue
        if first is None:
            first = candidate, values, latents
            if dtype != FP8:  # a float8 product is not exact; see the part `float8`
                exact = (x.to(dtype).double(), W.to(dtype).double(), b.double())
                allowed = _SUM_ERROR + (_TF32 if precision == "tf32" else 0.0)
                _check(context, row, exact, values, latents, allowed)
            continue
        differing = _differing(values, latents, *first[1:])
        context.report(
            "equal bits",
            **row,
            reference=first[0],
            differing=differing,
            passed=not differing,
        )
        yield not differing


def _inputs(context: Context, work: Work) -> _Inputs:
    device = context.setup.device
    x = torch.randn(work.B, work.D, device=device)
    W = torch.randn(work.L, work.D, device=device) * work.D**-0.5
    b = 0.1 * torch.randn(work.L, device=device)
    if context.interpreted:
        # The interpreter multiplies with BLAS, which adds in another order for each tile. Sums of
        # small integers do not depend on the order.
        return x.round(), (W * work.D**0.5).round(), b.round()
    return x, W, b


def _differing(
    values: torch.Tensor, latents: torch.Tensor, others: torch.Tensor, theirs: torch.Tensor
) -> int:
    """Return the number of selected pairs whose latent or whose value's bits differ."""
    bits = values.view(torch.int32) != others.view(torch.int32)
    return int((bits | (latents != theirs)).sum())


def _check(
    context: Context,
    row: Row,
    inputs: _Inputs,
    values: torch.Tensor,
    latents: torch.Tensor,
    allowed: float,
) -> None:
    """Compare values and selection with float64, up to rounding.

    Args:
        context: Receives the row.
        row: Keys of the row.
        inputs: x, W and b as the product sees them, in float64.
        values: [B, k] as selected.
        latents: [B, k] as selected.
        allowed: Allowed error, relative to |x| |w|.
    """
    x, W, b = inputs
    exact = x @ W.T + b
    sizes = x.norm(dim=1) * W.norm(dim=1).max()
    error = (values.double() - exact.gather(1, latents)).abs().amax(1) / sizes
    # No latent that was left out may exceed the smallest selected value by more than both errors.
    rest = exact.scatter(1, latents, -torch.inf).amax(1)
    missed = (rest - values.double().amin(1)).clamp_min(0) / sizes
    worst = float(torch.maximum(error, missed).nan_to_num(nan=torch.inf).max()) / allowed
    distinct = all(len(set(row)) == len(row) for row in latents.tolist())
    context.report(
        "selection against float64",
        **row,
        error_ratio=worst,
        passed=worst <= 1 and distinct,
    )
