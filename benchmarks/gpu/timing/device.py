"""Part `device`: what the GPU is, and how fast it copies and multiplies."""

from __future__ import annotations

import torch
import triton

from benchmarks.gpu.part import Context, Row, work_row
from benchmarks.harness.timing import interleaved
from benchmarks.step.memory import free_bytes, release
from benchmarks.step.work import Call, Inputs
from benchmarks.step.yardstick import encoder_gemms

_ROUNDS = 10


def run(context: Context) -> str:
    """Report the device, its copy bandwidth, a square product, and the bare product at A."""
    row = _describe(context)
    copy = _copy(context)
    release(context.setup.device)
    square = _square(context)
    release(context.setup.device)
    linear = _linear_at_a(context)
    return (
        f"{row['name']}: copy {copy['bytes_per_s'] / 1e12:.2f} TB/s, product "
        f"{square['flop_per_s'] / 1e12:.0f} TFLOP/s, F.linear at A "
        f"{1e3 * linear['median_s']:.2f} ms ({linear['flop_per_s'] / 1e12:.0f} TFLOP/s)"
    )


def _copy(context: Context) -> Row:
    n_bytes = context.shapes.copied_bytes
    source = torch.empty(n_bytes, dtype=torch.uint8, device=context.setup.device).random_()
    target = torch.empty_like(source)
    seconds = _median_s(context, lambda: target.copy_(source))
    return context.report("copy", median_s=seconds, bytes_per_s=2 * n_bytes / seconds)


def _square(context: Context) -> Row:
    n, dtype = context.shapes.matmul, context.setup.dtype
    one = torch.randn(n, n, device=context.setup.device, dtype=dtype)
    other = torch.randn_like(one)
    return _product(context, f"product {n}^3", 2 * n**3, lambda: one @ other)


def _linear_at_a(context: Context) -> Row:
    work = context.shapes.steps["A"]
    inputs = Inputs(work, context.setup)
    call = encoder_gemms(inputs.x, inputs.W, inputs.bias)["gemm"]
    flop = 2 * work.B * work.L * work.D
    return _product(context, "linear at A", flop, call, work=work_row(context, work))


def _describe(context: Context) -> Row:
    versions = {"torch": torch.__version__, "triton": triton.__version__}
    free = free_bytes(context.setup.device)
    if not context.on_cuda:
        return context.report("device", name="cpu", versions=versions, free_bytes=free)
    properties = torch.cuda.get_device_properties(context.setup.device)
    return context.report(
        "device",
        name=properties.name,
        capability=f"{properties.major}.{properties.minor}",
        multiprocessors=properties.multi_processor_count,
        memory_bytes=properties.total_memory,
        free_bytes=free,
        cuda=torch.version.cuda,
        versions=versions,
    )


def _product(context: Context, op: str, flop: int, call: Call, **more: object) -> Row:
    seconds = _median_s(context, call)
    return context.report(op, median_s=seconds, flop_per_s=flop / seconds, **more)


def _median_s(context: Context, call: Call) -> float:
    timing = interleaved(
        {"": call}, rounds=_ROUNDS, warmup=3, synchronize=context.setup.synchronize
    )
    return timing[""].median_s
