"""The body for NVIDIA GPUs, written in Triton and cut for Hopper."""

# mypy: disable-error-code="import-untyped, import-not-found"

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sae_core.errors import ConfigError, ShapeError
from sae_core.kernels.interface import RowGradients, SparseLatents

if TYPE_CHECKING:
    from types import ModuleType

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_LARGEST_LATENT = 1 << 31


class TritonKernels:
    """See `Kernels`. Selects by value, ties to the lowest latent; the same input, the same bits.

    The pre-activations' sums are float32, and so are the selected values. Encoding waits for the
    device once, to see whether any row has to be run again.

    Args:
        compute_dtype: dtype of the encoder product's inputs.
        precision: "ieee" or "tf32", how float32 inputs are multiplied.

    Raises:
        ConfigError: triton or a CUDA device is missing, or the dtype cannot be computed in.
    """

    name = "triton"

    def __init__(
        self, compute_dtype: torch.dtype = torch.bfloat16, precision: str = "ieee"
    ) -> None:
        interpreted = _check_triton()
        _check_dtype(compute_dtype, precision, interpreted)
        from sae_core.kernels import triton_encode, triton_sparse

        self.compute_dtype = compute_dtype
        self.interpreted = interpreted
        tiles = triton_encode.tiles(compute_dtype, precision)
        self._encoder = triton_encode.Encoder(
            compute_dtype, precision, triton_encode.INTERPRETER_TILES if interpreted else tiles
        )
        self._sparse: ModuleType = triton_sparse

    def encode_topk(
        self, x: torch.Tensor, W_enc: torch.Tensor, b_enc: torch.Tensor, k: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self._check(x, W_enc, b_enc)
        L = W_enc.shape[0]
        if not 0 <= k <= L < _LARGEST_LATENT:
            raise ShapeError(f"k={k}, L={L}: expected 0 <= k <= L < 2**31")
        if not x.shape[0] or not k:  # k 0: a shard without dead latents takes part in AuxK
            shape = (x.shape[0], k)
            return x.new_empty(shape, dtype=torch.float32), x.new_empty(shape, dtype=torch.int64)
        return self._encoder.topk(x, W_enc, b_enc, k)

    def decode(self, active: SparseLatents, W_dec: torch.Tensor) -> torch.Tensor:
        self._check(W_dec)
        recon: torch.Tensor = self._sparse.decode(active, _plain_rows(W_dec))
        return recon

    def decoder_dot(
        self, grad: torch.Tensor, active: SparseLatents, W_dec: torch.Tensor
    ) -> torch.Tensor:
        self._check(grad, W_dec)
        dot: torch.Tensor = self._sparse.decoder_dot(_plain_rows(grad), active, _plain_rows(W_dec))
        return dot

    def row_gradients(
        self, active: SparseLatents, dvalues: torch.Tensor, x: torch.Tensor, grad: torch.Tensor
    ) -> RowGradients:
        self._check(x, grad)
        gradients: RowGradients = self._sparse.row_gradients(
            active, dvalues, _plain_rows(x), _plain_rows(grad)
        )
        return gradients

    def _check(self, *tensors: torch.Tensor) -> None:
        for tensor in tensors:
            if tensor.device.type != "cuda" and not self.interpreted:
                raise ShapeError(
                    f"a tensor on {tensor.device}: the triton kernels take CUDA tensors; "
                    "use kernels=stock on this device"
                )
            if tensor.dtype not in _DTYPES:
                raise ShapeError(
                    f"a tensor of {tensor.dtype}: the triton kernels take bfloat16, float16 and "
                    "float32; use kernels=reference for float64"
                )


def _plain_rows(matrix: torch.Tensor) -> torch.Tensor:
    """Rows may lie anywhere, a row's columns side by side."""
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def _check_triton() -> bool:
    """Whether the kernels are interpreted."""
    try:
        import triton
    except ImportError as error:
        raise ConfigError(
            "kernels", "triton", "triton installed", "pip install triton, or kernels=stock"
        ) from error
    interpreted = bool(triton.knobs.runtime.interpret)
    if not interpreted and not torch.cuda.is_available():
        raise ConfigError(
            "kernels", "triton", "a CUDA device", "kernels=stock, or TRITON_INTERPRET=1 for tests"
        )
    return interpreted


def _check_dtype(compute_dtype: torch.dtype, precision: str, interpreted: bool) -> None:
    if compute_dtype not in _DTYPES:
        raise ConfigError("compute dtype", compute_dtype, "bfloat16, float16 or float32 for triton")
    if precision not in ("ieee", "tf32"):
        raise ConfigError("precision", precision, "ieee or tf32")
    if interpreted and compute_dtype == torch.bfloat16:
        raise ConfigError(
            "compute dtype",
            compute_dtype,
            "float16 or float32 under TRITON_INTERPRET",
            "the interpreter multiplies bfloat16 as raw bit patterns",
        )
