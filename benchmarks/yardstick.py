"""The bare encoder GEMM that every step is measured against."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def encoder_gemms(x: Tensor, W_enc: Tensor, b_enc: Tensor) -> dict[str, Callable[[], object]]:
    """Callables that write the dense pre-activations [B, L] = x @ W_enc.T + b_enc, nothing else.

    Args:
        x: [B, D], float32 or bfloat16.
        W_enc: [L, D], dtype of x.
        b_enc: [L], dtype of x.

    Returns:
        "gemm": the yardstick: oneDNN on a CPU, where it beats MKL by up to twofold (MKL is what
        `F.linear` and so all the peers take); `F.linear` on a GPU. "linear": `F.linear`.
    """

    @torch.no_grad()
    def linear() -> object:
        return F.linear(x, W_enc, b_enc)

    @torch.no_grad()
    def onednn() -> object:
        return torch.ops.mkldnn._linear_pointwise(x, W_enc, b_enc, "none", [], "")

    return {"gemm": onednn if x.device.type == "cpu" else linear, "linear": linear}
