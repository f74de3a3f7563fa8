"""Part `many`: products whose operands or results have more than 2**31 elements.

BLAS libraries have had faults at such sizes. The results are compared with float64 sums of sampled
elements. The samples include the last rows and those around element 2**31.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from benchmarks.gpu.part import Context, Row, work_row
from benchmarks.step.memory import free_bytes, release
from benchmarks.step.work import Work

_SAMPLES = 4096
_CHUNK_ROWS = 65536
_SPARE = 1.2
"""Required free memory, as a multiple of the operands and results."""


def run(context: Context) -> str:
    """Check a vector-matrix product and `F.linear`; each is skipped if memory is short."""
    work = context.shapes.many
    checks = {"vector @ matrix": _check_vector, "linear": _check_linear}
    needs = {
        "vector @ matrix": 4 * work.L * (work.D + 1),
        "linear": context.setup.dtype.itemsize * (work.L * work.D + work.B * (work.L + work.D)),
    }
    said = []
    for op, check in checks.items():
        release(context.setup.device)
        free = free_bytes(context.setup.device)
        if free is not None and free < _SPARE * needs[op]:
            reason = f"needs {_SPARE * needs[op] / 2**30:.0f} GiB, {free / 2**30:.0f} GiB are free"
            context.report(op, skipped=reason, work=work_row(context, work))
            said.append(f"{op}: skipped, {reason}")
            continue
        row = check(context, work)
        said.append(f"{op}: largest error {row['error_ratio']:.2g} of the allowed")
    return "; ".join(said)


def _check_vector(context: Context, work: Work) -> Row:
    """Check `vector [L] @ matrix [L, D]` in float32, which gives the gradient of `b_dec`."""
    device = context.setup.device
    matrix = torch.empty(work.L, work.D, device=device).normal_()
    vector = torch.randn(work.L, device=device)
    found = vector @ matrix
    wanted = torch.zeros(work.D, dtype=torch.float64, device=device)
    sizes = torch.zeros(work.D, dtype=torch.float64, device=device)
    for start in range(0, work.L, _CHUNK_ROWS):
        piece = slice(start, start + _CHUNK_ROWS)
        weights, rows = vector[piece].double(), matrix[piece]
        for first in range(0, work.D, 256):
            columns = slice(first, first + 256)
            part = rows[:, columns].double()
            wanted[columns] += weights @ part
            sizes[columns] += weights.square() @ part.square()
    # Rounding errors of L terms in any order stay far below 2**-12 of the terms' root sum square.
    allowed = sizes.sqrt() * 2.0**-12
    return _row(context, "vector @ matrix", work, found, wanted, allowed)


def _check_linear(context: Context, work: Work) -> Row:
    """Check `F.linear(x [B, D], W [L, D])` in the dtype of the encoder product."""
    device, dtype = context.setup.device, context.setup.dtype
    x = torch.randn(work.B, work.D, device=device, dtype=dtype)
    W = torch.empty(work.L, work.D, device=device, dtype=dtype).normal_(std=work.D**-0.5)
    with torch.no_grad():
        out = F.linear(x, W)
    places = _places(work.B * work.L, device)
    rows, latents = places // work.L, places % work.L
    found = out.view(-1)[places]
    ours, theirs = x[rows].double(), W[latents].double()
    wanted = (ours * theirs).sum(1)
    # The result is rounded to the dtype. Sums are float32: their error is relative to |x| |w|.
    allowed = wanted.abs() * 2 * torch.finfo(dtype).eps
    allowed += ours.norm(dim=1) * theirs.norm(dim=1) * 2.0**-16
    return _row(context, "linear", work, found, wanted, allowed)


def _places(elements: int, device: torch.device) -> torch.Tensor:
    """Return random places among `elements`, with both ends and those around 2**31."""
    places = torch.randint(elements, (_SAMPLES,), device=device)
    special = [0, elements - 1, *(2**31 + shift for shift in range(-2, 3))]
    kept = [place for place in special if place < elements]
    return torch.cat((places, torch.tensor(kept, device=device)))


def _row(
    context: Context,
    op: str,
    work: Work,
    found: torch.Tensor,
    wanted: torch.Tensor,
    allowed: torch.Tensor,
) -> Row:
    error = (found.double() - wanted).abs()
    ratio = float((error / allowed.clamp_min(1e-30)).nan_to_num(nan=torch.inf).max())
    return context.report(
        op,
        work=work_row(context, work),
        elements=max(work.L * work.D, work.B * work.L),
        samples=len(wanted),
        error_ratio=ratio,
        passed=ratio <= 1,
    )
