"""Part `float8`: the largest error of the float8 product, relative to its bound.

Two bounds cover two kinds of error: the rounding of the inputs, and the sums, which the device
computes with fewer bits than float32 has. Positive data make the sums lose most, because no term
cancels another.
"""

from __future__ import annotations

import torch

from benchmarks.gpu.part import Context, work_row
from benchmarks.step.work import Work
from sae_core.kernels.triton.body import TritonKernels
from sae_core.kernels.triton.prefilter_float8 import SLOTS, SplitRows, dequantise, split_spec
from sae_core.kernels.triton.quantise import split_rows

_COUNT = 256
"""Latents per row whose product is read back."""


def run(context: Context) -> str:
    """Report the largest ratio of error and bound, on random and on positive data."""
    if context.on_cuda and not context.setup.has_float8:
        context.report("float8 error", skipped="the device has no fast float8 products")
        return "skipped: the device has no fast float8 products"
    worst = {"error_ratio": 0.0, "sum_error_ratio": 0.0}
    for work in context.shapes.exact:
        for data in ("random", "positive"):
            found = _ratios(context, work, data)
            context.report(
                "float8 error",
                work=work_row(context, work),
                data=data,
                **found,
                passed=max(found.values()) <= 1,
            )
            worst = {name: max(worst[name], ratio) for name, ratio in found.items()}
    return (
        f"largest error {worst['error_ratio']:.2g} of its bound, of sums "
        f"{worst['sum_error_ratio']:.2g} of theirs"
    )


def _ratios(context: Context, work: Work, data: str) -> dict[str, float]:
    """Return the largest ratios of errors and bounds over the selected pairs of all rows."""
    device = context.setup.device
    x = torch.randn(work.B, work.D, device=device)
    W = torch.randn(work.L, work.D, device=device) * work.D**-0.5
    if data == "positive":
        x, W = x.abs(), W.abs()
    # The exact product has the inputs of the encoder's own dtype.
    x, W = x.to(context.setup.dtype).float(), W.to(context.setup.dtype)
    specs = split_spec(x, W)
    low_x, low_W = split_rows(x, specs[0]), split_rows(W, specs[1])
    kernels = TritonKernels(context.setup.dtype)
    none = torch.zeros(work.L, device=device)
    count = min(_COUNT, work.L)
    values, latents = kernels.bounded_topk(_unbounded(low_x), _unbounded(low_W), none, count)
    seen = _pair_products(dequantise(_unbounded(low_x)), dequantise(_unbounded(low_W)), latents)
    true = _pair_products(x, W.float(), latents)
    bounds = [
        _bound(low_x, column)[:, None].double() * _bound(low_W, column)[latents].double()
        for column in (-2, -1)
    ]
    # The sums of the bfloat16 part are covered by the margin of the prefilter, not by these bounds.
    margin = x.norm(dim=1)[:, None].double() * W.float().norm(dim=1)[latents].double() * 2.0**-19
    return {
        "error_ratio": _largest(values.double() - true, bounds[0] + bounds[1] + margin),
        "sum_error_ratio": _largest(values.double() - seen, bounds[1] + margin),
    }


def _unbounded(rows: SplitRows) -> SplitRows:
    """Return `rows` with the columns that carry bounds set to zero."""
    side = rows.side.clone()
    side[:, -SLOTS:] = 0
    return rows._replace(side=side)


def _bound(rows: SplitRows, column: int) -> torch.Tensor:
    """Return one factor of a bound for every row, [n]."""
    return rows.side[:, column].float() * rows.scales


def _pair_products(x: torch.Tensor, W: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
    """Return `x[row] . W[latent]` of pairs [B, C] in float64."""
    rows = [(W[chosen].double() @ one.double()) for one, chosen in zip(x, latents, strict=True)]
    return torch.stack(rows)


def _largest(error: torch.Tensor, bound: torch.Tensor) -> float:
    return float((error.abs() / bound.clamp_min(1e-30)).nan_to_num(nan=torch.inf).max())
