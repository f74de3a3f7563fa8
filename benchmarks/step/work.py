"""Inputs of the step benchmark: sizes, device and dtype, shared tensors, and cases."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from benchmarks.harness.errors import BenchmarkError
from sae_core.kernels.prefilter_choice import candidates
from sae_core.kernels.prefilter_timing import choose_prefilter
from sae_core.kernels.registry import KERNELS, get_kernels

Call = Callable[[], object]


@dataclass(frozen=True)
class Work:
    """A workload: the sizes of one measurement."""

    L: int
    """Number of latents."""
    D: int
    """Width of the activations (d_model)."""
    B: int
    """Number of batch rows."""
    k: int
    """Number of active latents per row."""

    @classmethod
    def parse(cls, text: str) -> Work:
        """Parse `L,D,B,k`.

        Raises:
            BenchmarkError: If `text` is not four whole numbers of at least 1, or k is above L.
        """
        sizes = parse_sizes(text, 4, "L,D,B,k")
        if sizes[3] > sizes[0]:
            raise BenchmarkError(
                f"work {text}: k={sizes[3]} must be at most L={sizes[0]}; use a smaller k"
            )
        return cls(*sizes)


def parse_sizes(text: str, count: int, form: str) -> list[int]:
    """Parse whole numbers separated by commas.

    Args:
        text: The numbers.
        count: Expected number of numbers.
        form: Names of the numbers, for error messages.

    Raises:
        BenchmarkError: If there are not `count` numbers, or one is below 1.
    """
    parts = text.split(",")
    if len(parts) != count or not all(part.isdecimal() and int(part) for part in parts):
        raise BenchmarkError(f"{text!r}: expected {form}, whole numbers of at least 1")
    return [int(part) for part in parts]


@dataclass(frozen=True)
class Setup:
    """Device, kernels and dtype that a workload is computed with."""

    device: torch.device
    kernels: str
    """Name of our kernels: "stock" or "triton"."""
    dtype: torch.dtype
    """Dtype of the inputs of the encoder product, ours and the yardstick's."""

    @classmethod
    def of(cls, device_type: str) -> Setup:
        """Return the trainer's setup: stock float32 on the CPU, triton bfloat16 on cuda."""
        if device_type == "cuda":
            return cls(torch.device("cuda"), "triton", torch.bfloat16)
        return cls(torch.device("cpu"), "stock", torch.float32)

    @property
    def has_float8(self) -> bool:
        """True if the device multiplies float8 faster than bfloat16."""
        return self.device.type == "cuda" and torch.cuda.get_device_capability() >= (9, 0)

    def synchronize(self) -> None:
        """Wait for the device to finish its work."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()


class Inputs:
    """The tensors that all operations of a workload share, created on the device at first use.

    Args:
        work: Sizes.
        setup: Device and dtype.
    """

    def __init__(self, work: Work, setup: Setup) -> None:
        self.work = work
        self.setup = setup

    def row(self) -> dict[str, Any]:
        """Return the `work` of a benchmark row."""
        return {**vars(self.work), "dtype": str(self.setup.dtype).removeprefix("torch.")}

    @property
    def needs_bytes(self) -> int:
        """Bytes of the tensors `raw`, `x`, `W` and `bias`."""
        work, size = self.work, self.setup.dtype.itemsize
        return work.B * work.D * (4 + size) + work.L * (work.D + 1) * size

    @cached_property
    def raw(self) -> torch.Tensor:
        """The batch, [B, D] float32, standard normal."""
        return torch.randn(self.work.B, self.work.D, device=self.setup.device)

    @cached_property
    def x(self) -> torch.Tensor:
        """`raw` in the dtype of the encoder product."""
        return self.raw.to(self.setup.dtype)

    @cached_property
    def W(self) -> torch.Tensor:
        """The dictionary, [L, D], rows of about unit norm, in the dtype of the encoder product."""
        W = torch.empty(self.work.L, self.work.D, dtype=self.setup.dtype, device=self.setup.device)
        return W.normal_(std=self.work.D**-0.5)

    @cached_property
    def auto_prefilter(self) -> str:
        """The prefilter that `train.prefilter=auto` chooses by time at the first use."""
        work, setup = self.work, self.setup
        names = candidates(
            KERNELS[setup.kernels], setup.device.type, str(setup.dtype).removeprefix("torch.")
        )
        if len(names) == 1:
            return names[0]
        kernels: Any = get_kernels(setup.kernels, setup.dtype)
        choice = choose_prefilter(kernels, names, self.W, self.bias, work.B, work.k)
        print(choice, file=sys.stderr, flush=True)
        return choice.name

    @cached_property
    def bias(self) -> torch.Tensor:
        """The encoder's bias, [L] zeros, in the dtype of the encoder product."""
        return self.W.new_zeros(self.work.L)


@dataclass(frozen=True)
class Case:
    """One row of the table, before it is measured."""

    system: str
    """"ours", "torch", or "baseline" (see `benchmarks.step.baselines`)."""
    op: str
    """Name of the operation."""
    make: Callable[[], Call]
    """Returns the function to time."""
    needs_bytes: int
    """Minimum memory in addition to the inputs. With less free memory, the case is not run."""
    stateful: bool = False
    """Count the weights and moments that `make` builds as the row's memory."""
    prepare: Call = lambda: None
    """Called before `make`; neither its time nor its memory counts in the row."""
    encodes: bool = True
    """The operation includes the encoder product, so its MFU can be computed."""
    notes: Mapping[str, Any] = field(default_factory=dict)
    """Additional keys of the row."""
