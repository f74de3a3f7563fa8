"""The registry of kernel bodies: implementations of `Kernels`. Does not import torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from foundation.registry import Registry, import_attribute

if TYPE_CHECKING:
    import torch

    from sae_core.kernels.interface import Kernels


@dataclass(frozen=True)
class KernelBody:
    """Registry entry of a kernel body, which is available without importing torch."""

    build: str
    """"module:function" that takes `compute_dtype`, `tf32` and `prefilter`, as in `get_kernels`,
    and returns the `Kernels`. It raises a ConfigError for options that it does not support."""
    prefilters: tuple[str, ...] = ()
    """Names of its prefilters, in addition to `auto` and `none`."""
    prefilter_dtypes: tuple[str, ...] = ()
    """Values of `train.compute_dtype` that its prefilters support."""


STOCK = KernelBody("sae_core.kernels.stock.body:build", ("bfloat16x3", "bfloat16"), ("float32",))
TRITON = KernelBody("sae_core.kernels.triton.body:build", ("float8",), ("float32", "bfloat16"))
REFERENCE = KernelBody("sae_core.kernels.reference:build")

KERNELS: Registry[KernelBody] = Registry(
    "kernel body",
    "train.kernels",
    "kernels",
    {
        "stock": "sae_core.kernels.registry:STOCK",
        "triton": "sae_core.kernels.registry:TRITON",
        "reference": "sae_core.kernels.registry:REFERENCE",
    },
)


def get_kernels(
    name: str, compute_dtype: torch.dtype, *, tf32: bool = False, prefilter: str = "none"
) -> Kernels:
    """Build the kernels called `name`.

    Args:
        name: Name in `KERNELS`.
        compute_dtype: Dtype of the encoder product's inputs.
        tf32: Multiply float32 in TF32 on tensor cores, with 10 bits of mantissa.
        prefilter: `none`, `bfloat16` or `bfloat16x3` (stock with float32), `float8` (triton), or
            `auto`: bfloat16x3 for stock on CPUs that multiply bfloat16 in hardware, else none.

    Raises:
        ConfigError: If the name is unknown, or these kernels do not run on this machine or do not
            support the options.
    """
    build = import_attribute(KERNELS[name].build)
    kernels: Kernels = build(compute_dtype, tf32, prefilter)
    return kernels


def default_kernels(device_type: str) -> str:
    """Return the name of the kernels that `train.kernels=auto` selects on a device."""
    return "triton" if device_type == "cuda" else "stock"
