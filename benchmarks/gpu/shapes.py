"""Sizes of all parts: those of a GPU, and tiny ones for Triton's interpreter."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.step.work import Work


@dataclass(frozen=True)
class Shapes:
    """Sizes that the parts measure."""

    steps: dict[str, Work]
    """Workloads of the step table, by name."""
    largest: dict[str, Work]
    """Workloads of the part `largest`, by name: the first that fits is measured."""
    copied_bytes: int
    """Size of the tensor whose copy gives the memory bandwidth."""
    matmul: int
    """Rows and columns of the square bfloat16 product."""
    many: Work
    """Workload whose dictionary and whose pre-activations both have more than 2**31 elements."""
    exact: tuple[Work, ...]
    """Workloads on which the encoder's candidates and the float8 bound are checked."""
    resumed: Work
    """Workload of the runs that are saved, resumed and compared."""
    resumed_steps: int
    """Length of these runs; they are saved halfway."""
    profiled_steps: int
    """Steps in a profile."""
    sanitised: Work
    """Workload that runs under compute-sanitizer."""
    case_stride: int
    """Run every n-th kernel case."""
    rounds: int
    """Samples of each time; fewer are taken if time is short."""
    warmup: int
    """Untimed calls of each candidate of the encoder before its samples."""


GPU = Shapes(
    steps={
        "A": Work(L=131072, D=768, B=32768, k=32),
        "B": Work(L=1048576, D=768, B=131072, k=32),
    },
    largest={
        "C": Work(L=1048576, D=4096, B=32768, k=64),
        "C at 131k": Work(L=131072, D=4096, B=32768, k=64),
    },
    copied_bytes=4 << 30,
    matmul=8192,
    many=Work(L=1048576, D=4096, B=4096, k=64),
    exact=(Work(L=16384, D=768, B=1024, k=32), Work(L=16384, D=4096, B=512, k=64)),
    resumed=Work(L=16384, D=768, B=8192, k=32),
    resumed_steps=20,
    profiled_steps=3,
    sanitised=Work(L=1024, D=768, B=256, k=32),
    case_stride=1,
    rounds=7,
    warmup=2,
)
_TINY = Work(L=24, D=16, B=4, k=2)
INTERPRETED = Shapes(
    steps={"A": _TINY},
    largest={"C": Work(L=32, D=24, B=4, k=3), "C at 131k": _TINY},
    copied_bytes=1 << 20,
    matmul=64,
    many=Work(L=700, D=40, B=33, k=4),
    exact=(Work(L=280, D=136, B=3, k=3),),
    resumed=_TINY,
    resumed_steps=2,
    profiled_steps=1,
    sanitised=_TINY,
    case_stride=40,
    rounds=1,
    warmup=0,
)
"""So small that Triton's interpreter runs each part in seconds."""
