"""Kernels whose full product and whose prefilter take longer than they need."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from foundation.errors import ConfigError
from sae_core.kernels import Kernels
from sae_core.kernels.prefilter import Candidates
from sae_core.kernels.registry import KERNELS, KernelBody
from sae_core.kernels.stock.body import StockKernels

FULL_S, FILTER_S = "TOY_FULL_S", "TOY_FILTER_S"
"""Environment variables with the extra seconds of each product; a negative number of seconds for
the prefilter means that this machine does not support it."""


class DelayedPrefilter:
    """A prefilter whose candidates come from the full product; always certified."""

    name = "delayed"

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def candidates(
        self, x: torch.Tensor, W_enc: torch.Tensor, b_enc: torch.Tensor, k: int
    ) -> Candidates:
        time.sleep(self._seconds)
        found = StockKernels().exact_topk(x, W_enc, b_enc, k + 8)
        return Candidates(*found, torch.full_like(x[:, 0], 1e-4))


class DelayedKernels(StockKernels):
    """Stock kernels with a delay in the full product, and with `DelayedPrefilter`."""

    name = "delayed"

    def __init__(self, full_s: float, filter_s: float) -> None:
        super().__init__(torch.float32)
        self.full_s = full_s
        self.filter_s = filter_s

    def use_prefilter(self, name: str) -> None:
        if name not in ("none", "delayed") or (name == "delayed" and self.filter_s < 0):
            raise ConfigError("train.prefilter", name, "none")
        self.prefilter = None if name == "none" else DelayedPrefilter(self.filter_s)

    def exact_topk(
        self, x: torch.Tensor, W_enc: torch.Tensor, b_enc: torch.Tensor, k: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        time.sleep(self.full_s)
        return super().exact_topk(x, W_enc, b_enc, k)


def build_delayed(compute_dtype: torch.dtype, tf32: bool, prefilter: str) -> Kernels:
    """Build `DelayedKernels` with the delays in the environment."""
    kernels = DelayedKernels(float(os.environ[FULL_S]), float(os.environ[FILTER_S]))
    kernels.use_prefilter(prefilter)
    return kernels


DELAYED = KernelBody(
    "tests.support.toys.prefilter:build_delayed",
    prefilters=("delayed",),
    prefilter_dtypes=("float32",),
    prefilter_devices=("cpu",),
    timed_prefilters=("delayed",),
)


@contextmanager
def registered_delayed(full_s: float, filter_s: float) -> Iterator[None]:
    """Add the kernel body `delayed` with these extra seconds."""
    os.environ.update({FULL_S: str(full_s), FILTER_S: str(filter_s)})
    with KERNELS.registered("delayed", DELAYED):
        yield
