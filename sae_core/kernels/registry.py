"""Which body of the kernels runs where."""

from __future__ import annotations

import torch

from sae_core.errors import ConfigError
from sae_core.kernels.interface import Kernels
from sae_core.kernels.reference import ReferenceKernels
from sae_core.kernels.stock import StockKernels


def get_kernels(name: str, compute_dtype: torch.dtype) -> Kernels:
    """The body called `name`.

    Raises:
        ConfigError: no such body, it cannot run here, or not in that dtype.
    """
    if name == "reference":
        if compute_dtype not in (torch.float32, torch.float64):
            raise ConfigError("compute dtype", compute_dtype, "float32 or float64 for reference")
        return ReferenceKernels()
    if name == "stock":
        if compute_dtype not in (torch.float32, torch.bfloat16):
            raise ConfigError("compute dtype", compute_dtype, "float32 or bfloat16 for stock")
        return StockKernels(compute_dtype)
    if name == "triton":
        from sae_core.kernels.triton_body import TritonKernels

        return TritonKernels(compute_dtype)
    raise ConfigError("train.kernels", name, "one of: stock, triton, reference")
