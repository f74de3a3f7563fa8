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
    devices: tuple[str, ...] = ("cpu", "cuda")
    """Types of devices on which it runs."""
    prefilters: tuple[str, ...] = ()
    """Names of its prefilters, in addition to `none`."""
    prefilter_dtypes: tuple[str, ...] = ()
    """Values of `train.compute_dtype` that its prefilters support."""
    prefilter_devices: tuple[str, ...] = ()
    """Types of devices, "cpu" or "cuda", on which its prefilters run."""
    timed_prefilters: tuple[str, ...] = ()
    """Prefilters that `train.prefilter=auto` chooses from by time, besides `none`. They must be
    exact for every row. With any, the kernels are
    `sae_core.kernels.prefilter_timing.PrefilteringKernels`."""


STOCK = KernelBody(
    "sae_core.kernels.stock.body:build",
    prefilters=("bfloat16x3", "bfloat16"),
    prefilter_dtypes=("float32",),
    prefilter_devices=("cpu",),
    timed_prefilters=("bfloat16x3",),
)
TRITON = KernelBody(
    "sae_core.kernels.triton.body:build",
    devices=("cuda",),
    prefilters=("float8",),
    prefilter_dtypes=("float32", "bfloat16"),
    prefilter_devices=("cuda",),
)
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
        prefilter: `none`, `bfloat16` or `bfloat16x3` (stock with float32 on the CPU), or `float8`
            (triton). For `train.prefilter=auto`, build with `none`, then call
            `sae_core.kernels.prefilter_timing.choose_prefilter`.

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
