"""What the step benchmark measures on: sizes, device and dtype, and the tensors they need."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from benchmarks.errors import BenchmarkError

Call = Callable[[], object]


@dataclass(frozen=True)
class Work:
    """Sizes of one measurement."""

    L: int
    D: int
    B: int
    k: int

    @classmethod
    def parse(cls, text: str) -> Work:
        """`L,D,B,k`.

        Raises:
            BenchmarkError: not four whole numbers of at least 1, or k above L.
        """
        sizes = parse_sizes(text, 4, "L,D,B,k")
        if sizes[3] > sizes[0]:
            raise BenchmarkError(f"work {text}: expected k of at most L={sizes[0]}; lower k")
        return cls(*sizes)


def parse_sizes(text: str, count: int, form: str) -> list[int]:
    """Whole numbers between commas.

    Raises:
        BenchmarkError: not `count` of them, or one below 1.
    """
    parts = text.split(",")
    if len(parts) != count or not all(part.isdecimal() and int(part) for part in parts):
        raise BenchmarkError(f"{text!r}: expected {form}, whole numbers of at least 1")
    return [int(part) for part in parts]


@dataclass(frozen=True)
class Setup:
    """Where and in what a work is computed."""

    device: torch.device
    kernels: str
    """Body of our kernels."""
    dtype: torch.dtype
    """Inputs of the encoder product, ours and the yardstick's."""

    @classmethod
    def of(cls, device_type: str) -> Setup:
        """What the trainer takes there: stock float32 on the CPU, triton bfloat16 on cuda."""
        if device_type == "cuda":
            return cls(torch.device("cuda"), "triton", torch.bfloat16)
        return cls(torch.device("cpu"), "stock", torch.float32)

    @property
    def has_float8(self) -> bool:
        """Whether the device multiplies float8 faster than bfloat16."""
        return self.device.type == "cuda" and torch.cuda.get_device_capability() >= (9, 0)

    def synchronize(self) -> None:
        """Waits for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()


class Inputs:
    """The tensors that all operations on one work share, made on the device when first asked for.

    Args:
        work: sizes.
        setup: device and dtype.
    """

    def __init__(self, work: Work, setup: Setup) -> None:
        self.work, self.setup = work, setup

    def row(self) -> dict[str, Any]:
        """As the `work` of a benchmark row."""
        return {**vars(self.work), "dtype": str(self.setup.dtype).removeprefix("torch.")}

    @property
    def needs_bytes(self) -> int:
        """Bytes of the tensors below."""
        work, size = self.work, self.setup.dtype.itemsize
        return work.B * work.D * (4 + size) + work.L * (work.D + 1) * size

    @cached_property
    def raw(self) -> torch.Tensor:
        """[B, D] float32, standard normal."""
        return torch.randn(self.work.B, self.work.D, device=self.setup.device)

    @cached_property
    def x(self) -> torch.Tensor:
        """`raw` in the dtype of the encoder product."""
        return self.raw.to(self.setup.dtype)

    @cached_property
    def W(self) -> torch.Tensor:
        """[L, D] rows of about unit norm, in the dtype of the encoder product."""
        W = torch.empty(self.work.L, self.work.D, dtype=self.setup.dtype, device=self.setup.device)
        return W.normal_(std=self.work.D**-0.5)

    @cached_property
    def bias(self) -> torch.Tensor:
        """[L] zeros, in the dtype of the encoder product."""
        return self.W.new_zeros(self.work.L)


@dataclass(frozen=True)
class Case:
    """One row of the table, before it is measured."""

    system: str
    """ours, torch, or baseline: written here after the maths of other trainers."""
    op: str
    make: Callable[[], Call]
    """Gives what is timed."""
    needs_bytes: int
    """What it surely needs beside the inputs; more than is free, and it is not tried."""
    stateful: bool = False
    """Its peak memory counts what `make` builds: weights and moments."""
    prepare: Call = lambda: None
    """Called before `make`, not timed, and none of what it leaves counts as the row's memory."""
    encodes: bool = True
    """It holds the encoder product, so that an MFU can be given."""
    notes: Mapping[str, Any] = field(default_factory=dict)
    """Further keys of the row."""
