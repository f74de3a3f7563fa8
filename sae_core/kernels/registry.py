"""Select the kernel implementation by name."""

from __future__ import annotations

import torch

from foundation.errors import ConfigError
from sae_core.kernels.interface import Kernels
from sae_core.kernels.prefilter import Prefilter
from sae_core.kernels.reference import ReferenceKernels
from sae_core.kernels.stock.body import StockKernels
from sae_core.kernels.stock.prefilter_bfloat16 import Bfloat16Prefilter, bfloat16_is_fast


def get_kernels(
    name: str, compute_dtype: torch.dtype, *, tf32: bool = False, prefilter: str = "none"
) -> Kernels:
    """Return the kernels called `name`.

    Args:
        name: stock, triton or reference.
        compute_dtype: dtype of the encoder product's inputs.
        tf32: multiply float32 in TF32 on tensor cores, with 10 bits of mantissa.
        prefilter: none; bfloat16 or bfloat16x3 (stock with float32); float8 (triton); or auto,
            which means bfloat16x3 for stock on CPUs that multiply bfloat16 in hardware, else none.

    Raises:
        ConfigError: If the name is unknown, or these kernels do not run on this machine or do not
            support the options.
    """
    if tf32 and name != "triton":
        raise ConfigError("train.compute_dtype", "tf32", f"float32 for kernels={name}")
    if name == "reference":
        if compute_dtype not in (torch.float32, torch.float64):
            raise ConfigError(
                "compute dtype", compute_dtype, "float32 or float64 for kernels=reference"
            )
        if prefilter not in ("auto", "none"):
            raise ConfigError("train.prefilter", prefilter, "none for kernels=reference")
        return ReferenceKernels()
    if name == "stock":
        if compute_dtype not in (torch.float32, torch.bfloat16):
            raise ConfigError(
                "compute dtype", compute_dtype, "float32 or bfloat16 for kernels=stock"
            )
        return StockKernels(compute_dtype, _stock_prefilter(prefilter, compute_dtype))
    if name == "triton":
        from sae_core.kernels.triton.body import TritonKernels

        if prefilter not in ("auto", "none", "float8"):
            raise ConfigError("train.prefilter", prefilter, "none or float8 for kernels=triton")
        if tf32 and prefilter == "float8":
            raise ConfigError("train.prefilter", prefilter, "none with train.compute_dtype=tf32")
        return TritonKernels(
            compute_dtype, "tf32" if tf32 else "ieee", float8_prefilter=prefilter == "float8"
        )
    raise ConfigError("train.kernels", name, "one of: stock, triton, reference")


def _stock_prefilter(prefilter: str, compute_dtype: torch.dtype) -> Prefilter | None:
    """Return the prefilter of the stock kernels; None: no prefilter."""
    possible = compute_dtype == torch.float32 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if prefilter == "auto":
        prefilter = "bfloat16x3" if possible and bfloat16_is_fast() else "none"
    if prefilter == "none":
        return None
    if prefilter not in ("bfloat16", "bfloat16x3"):
        expected = "none, bfloat16 or bfloat16x3 for kernels=stock"
        raise ConfigError("train.prefilter", prefilter, expected)
    if not possible:
        raise ConfigError(
            "train.prefilter",
            prefilter,
            "none",
            "for a bfloat16 prefilter, use compute_dtype=float32 on a CPU with AVX-512",
        )
    return Bfloat16Prefilter(split=prefilter == "bfloat16x3")
