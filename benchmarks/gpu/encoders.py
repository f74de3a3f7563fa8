"""The candidates for the encoder's kernels: everything that the encoder may choose between.

All parts that compare or time candidates take them from `candidates`.
"""

# Triton ships no types.
# mypy: disable-error-code="import-untyped, import-not-found"

from __future__ import annotations

from collections.abc import Callable

import torch

from sae_core.kernels.triton.encoder import candidates as ways
from sae_core.kernels.triton.encoder import encode
from sae_core.kernels.triton.prefilter_float8 import split_spec
from sae_core.kernels.triton.quantise import FP8, split_rows

TopK = Callable[[], tuple[torch.Tensor, torch.Tensor]]
PRODUCTS = ((torch.bfloat16, "ieee"), (torch.float32, "tf32"), (FP8, "ieee"))
"""Dtypes and precisions of the encoder's products on a GPU."""
INTERPRETED_PRODUCTS = ((torch.float16, "ieee"), (FP8, "ieee"))
"""The same for the interpreter, which cannot multiply bfloat16."""


def candidates(dtype: torch.dtype, precision: str, interpreted: bool) -> dict[str, encode.Encoder]:
    """Return the encoders to choose between, by name; the first is the default.

    Args:
        dtype: Dtype of the product's inputs.
        precision: How float32 inputs are multiplied, "ieee" or "tf32".
        interpreted: True if kernels run in Triton's interpreter, which cannot run inline PTX.
    """
    default = ways.INTERPRETER_TILES if interpreted else ways.tiles(dtype, precision)
    encoder = encode.Encoder(dtype, precision, default, interpreted)
    options = (default.few, default.many) if interpreted else ways.candidates(dtype, precision)
    return {option.label: encoder.with_few(option) for option in options}


def products(interpreted: bool, float8: bool) -> list[tuple[torch.dtype, str]]:
    """Return the dtypes and precisions to try; float8 only if the device supports it."""
    all_of_them = INTERPRETED_PRODUCTS if interpreted else PRODUCTS
    return [product for product in all_of_them if float8 or product[0] != FP8]


def product_name(dtype: torch.dtype, precision: str) -> str:
    """Return the name of a product, such as "bfloat16" or "tf32"."""
    if dtype == FP8:
        return "float8"
    if dtype == torch.float32 and precision != "ieee":
        return precision
    return str(dtype).removeprefix("torch.")


def topk_call(
    encoder: encode.Encoder, x: torch.Tensor, W: torch.Tensor, b: torch.Tensor, k: int
) -> TopK:
    """Return a call of the encoder; float8 gets rows that were split before.

    Args:
        encoder: One of `candidates`.
        x: [B, D].
        W: [L, D].
        b: [L].
        k: Number of latents to select.
    """
    if encoder.dtype != FP8:
        own = W.to(encoder.dtype)
        return lambda: encoder.topk(x, own, b, k)
    x_spec, W_spec = split_spec(x, W)
    low_x, low_W = split_rows(x, x_spec), split_rows(W, W_spec)
    return lambda: encoder.topk_split(low_x, low_W, b, k)
