"""The yardstick: the bare encoder GEMM that every step is compared with."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

_PIECE_ELEMENTS = 1 << 30
"""Maximum pre-activations per product; bounds memory, and keeps BLAS offsets within 32 bits."""


def encoder_gemms(x: Tensor, W_enc: Tensor, b_enc: Tensor) -> dict[str, Callable[[], None]]:
    """Return callables that only compute the dense pre-activations x @ W_enc.T + b_enc, [B, L].

    If [B, L] has more than 2**30 elements, it is computed in pieces, each a range of batch rows.
    Each piece is freed before the next is computed. A call's time covers all pieces, but [B, L]
    never exists as a whole.

    Args:
        x: [B, D], float32 or bfloat16; float16 as well, for Triton's interpreter.
        W_enc: [L, D], dtype of x.
        b_enc: [L], dtype of x.

    Returns:
        "gemm" is the yardstick: oneDNN on a CPU, where it is up to twice as fast as MKL, and
        `F.linear` on a GPU. "linear" exists on a CPU only: `F.linear`, which uses MKL and which all
        peers use.
    """
    pieces = x.split(max(1, _PIECE_ELEMENTS // W_enc.shape[0]))

    @torch.no_grad()
    def linear() -> None:
        for piece in pieces:
            F.linear(piece, W_enc, b_enc)

    @torch.no_grad()
    def onednn() -> None:
        for piece in pieces:
            torch.ops.mkldnn._linear_pointwise(piece, W_enc, b_enc, "none", [], "")

    if x.device.type == "cpu":
        if x.dtype == torch.float16:  # oneDNN multiplies it on some processors only
            return {"gemm": linear, "linear": linear}
        return {"gemm": onednn, "linear": linear}
    return {"gemm": linear}
