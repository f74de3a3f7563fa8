"""Triton kernels for NVIDIA GPUs, with tile sizes for Hopper."""

# Triton ships no types.
# mypy: disable-error-code="import-untyped, import-not-found"

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from foundation.errors import ConfigError
from sae_core.errors import ShapeError
from sae_core.kernels.interface import (
    Affine,
    Centred,
    Decoded,
    RowGradients,
    RowUpdate,
    SparseGradient,
    SparseLatents,
    Subset,
)
from sae_core.kernels.prefilter import n_float8_candidates, prefiltered_topk
from sae_core.kernels.triton.prefilter_float8 import Float8Prefilter, SplitRows

if TYPE_CHECKING:
    from types import ModuleType

    from sae_core.kernels.triton.encoder.encode import Encoder

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_LARGEST_LATENT = 1 << 31


class TritonKernels:
    """Implementation in Triton; see `Kernels`. Results are reproducible bit for bit.

    Pre-activations are summed in float32; the selected values and all gradients are float32 too.
    Only `row_gradients`, which the dense update uses, makes the host wait for the device.

    Args:
        compute_dtype: Dtype of the encoder product's inputs.
        precision: How float32 inputs are multiplied, "ieee" or "tf32".
        float8_prefilter: Find candidate latents with a float8 product, then compute only these
            exactly.

    Raises:
        ConfigError: If triton or a CUDA device is missing, or `compute_dtype` or `precision` is not
            supported.
    """

    name = "triton"
    asynchronous = True

    def __init__(
        self,
        compute_dtype: torch.dtype = torch.bfloat16,
        precision: str = "ieee",
        *,
        float8_prefilter: bool = False,
    ) -> None:
        interpreted = _check_triton()
        _check_dtype(compute_dtype, precision, interpreted)
        from sae_core.kernels.triton import dense, segments, sparse
        from sae_core.kernels.triton import update as triton_update
        from sae_core.kernels.triton.quantise import split_rows

        self.compute_dtype = compute_dtype
        self.copy_dtype = compute_dtype if compute_dtype != torch.float32 else None
        # Inputs and errors are not gathered in float16, in which small errors would underflow.
        self.gather_dtype = compute_dtype if compute_dtype == torch.bfloat16 else None
        self.interpreted = interpreted
        self.prefilter = (
            Float8Prefilter(self.bounded_topk, split_rows) if float8_prefilter else None
        )
        self._encoder = _encoder(compute_dtype, precision, interpreted)
        self._float8_encoder = _encoder(torch.float8_e4m3fn, "ieee", interpreted)
        self._dense: ModuleType = dense
        self._sparse: ModuleType = sparse
        self._segments: ModuleType = segments
        self._update: ModuleType = triton_update

    def prepare(self, n_rows: int, n_latents: int, d_model: int, k: int) -> None:
        """See `Prepared.prepare`: choose the encoder's kernel by timing; see `choose.py`.

        Without a call, or under the interpreter, the default kernel is used. Selected latents are
        the same either way.
        """
        if self.interpreted or not n_rows or not k:
            return
        from sae_core.kernels.triton.encoder.choose import choose

        if self.prefilter is None:
            few = choose(self._encoder, n_rows, n_latents, d_model, k)
            self._encoder = self._encoder.with_few(few)
            return
        # The exact encoder only runs the rows that the prefilter could not certify.
        count = n_float8_candidates(d_model, n_latents, k)
        few = choose(self._float8_encoder, n_rows, n_latents, d_model, count)
        self._float8_encoder = self._float8_encoder.with_few(few)

    def centre(self, raw: torch.Tensor, affine: Affine) -> Centred:
        """See `Kernels.centre`."""
        self._check(raw)
        centred: Centred = self._dense.centre(raw, affine, self.gather_dtype)
        return centred

    def encode_topk(
        self,
        x: torch.Tensor,
        W_enc: torch.Tensor,
        b_enc: torch.Tensor,
        k: int,
        among: Subset | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Kernels.encode_topk`."""
        if self.prefilter is not None and among is None and x.shape[0]:
            # Candidates are rescored as in the full product: inputs rounded, sums in float32.
            rounded = x.to(self.compute_dtype).float()
            W_enc = W_enc.to(self.compute_dtype)
            return prefiltered_topk(self.prefilter, self, rounded, W_enc, b_enc, k)
        return self.exact_topk(x, W_enc, b_enc, k, among=among)

    def exact_topk(
        self,
        x: torch.Tensor,
        W_enc: torch.Tensor,
        b_enc: torch.Tensor,
        k: int,
        rows: Subset | None = None,
        among: Subset | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run `encode_topk` without a prefilter, on some rows or on all of them.

        Args:
            x: [B, D] centred inputs.
            W_enc: [L, D].
            b_enc: [L].
            k: Number to select; at most L.
            rows: Rows to encode; None means all of them. The results of other rows are undefined.
            among: Latents to select from; None means all of them.
        """
        self._check(x, W_enc, b_enc)
        if _is_empty(x.shape[0], W_enc.shape[0], k):
            shape = (x.shape[0], k)
            return x.new_empty(shape, dtype=torch.float32), x.new_empty(shape, dtype=torch.int64)
        return self._encoder.topk(x, W_enc, b_enc, k, rows, among)

    def bounded_topk(
        self, x: SplitRows, W: SplitRows, b: torch.Tensor, count: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Select the `count` largest upper bounds of every row from the product of split rows.

        The device adds float8 products with fewer bits than float32 has (about 14 on sm_90); the
        bounds allow for this. On a GPU, latents whose value is NaN are selected.

        Args:
            x: B split rows.
            W: L split rows.
            b: [L].
            count: Number to select; at most L.

        Returns:
            values [B, count] float32, descending, and latents [B, count] int64.

        Raises:
            ConfigError: If the device does not support float8.
            ShapeError: If `count` is out of range, or a tensor's device or dtype is unsupported.
        """
        self._check(x.scales, W.scales, b)
        device = x.scales.device
        if not self.interpreted and torch.cuda.get_device_capability(device) < (8, 9):
            name = torch.cuda.get_device_name(device)
            raise ConfigError(
                "device",
                name,
                "compute capability 8.9 or higher for float8",
                "use train.prefilter=none",
            )
        B, L = len(x.scales), len(W.scales)
        if _is_empty(B, L, count):
            return x.scales.new_empty(B, count), b.new_empty(B, count, dtype=torch.int64)
        return self._float8_encoder.topk_split(x, W, b, count)

    def decode(self, active: SparseLatents, W_dec: torch.Tensor) -> torch.Tensor:
        """See `Kernels.decode`."""
        self._check(W_dec)
        recon: torch.Tensor = self._sparse.decode(active, W_dec)
        return recon

    def decoder_dot(
        self, vectors: torch.Tensor, active: SparseLatents, matrix: torch.Tensor
    ) -> torch.Tensor:
        """See `Kernels.decoder_dot`."""
        self._check(vectors, matrix)
        dot: torch.Tensor = self._sparse.decoder_dot(vectors, active, matrix)
        return dot

    def decode_error(
        self, target: torch.Tensor | Centred, active: SparseLatents, W_dec: torch.Tensor
    ) -> Decoded:
        """See `Kernels.decode_error`."""
        self._check(target.raw if isinstance(target, Centred) else target, W_dec)
        decoded: Decoded = self._sparse.decode_error(target, active, W_dec, self.gather_dtype)
        return decoded

    def subtract(self, target: torch.Tensor | Centred, recon: torch.Tensor) -> Decoded:
        """See `Kernels.subtract`."""
        self._check(target.raw if isinstance(target, Centred) else target, recon)
        decoded: Decoded = self._dense.subtract(target, recon, self.gather_dtype)
        return decoded

    def row_gradients(
        self, active: SparseLatents, dvalues: torch.Tensor, x: torch.Tensor, error: torch.Tensor
    ) -> RowGradients:
        """See `Kernels.row_gradients`."""
        self._check(x, error)
        gradients: RowGradients = self._segments.row_gradients(active, dvalues, x, error)
        return gradients

    def row_update(self, gradient: SparseGradient, W_dec: torch.Tensor) -> RowUpdate:
        """See `Kernels.row_update`."""
        self._check(gradient.x, gradient.error, W_dec)
        update: RowUpdate = self._update.TritonRowUpdate(gradient, W_dec)
        return update

    def _check(self, *tensors: torch.Tensor) -> None:
        for tensor in tensors:
            if tensor.device.type != "cuda" and not self.interpreted:
                raise ShapeError(
                    f"tensor is on {tensor.device}: the triton kernels need CUDA tensors; "
                    "use train.kernels=stock on this device"
                )
            if tensor.dtype not in _DTYPES:
                raise ShapeError(
                    f"tensor has dtype {tensor.dtype}: the triton kernels need bfloat16, float16 "
                    "or float32; use train.kernels=reference for float64"
                )


def build(compute_dtype: torch.dtype, tf32: bool, prefilter: str) -> TritonKernels:
    """Build these kernels with the settings of training; see `get_kernels`."""
    if prefilter not in ("none", "float8"):
        raise ConfigError("train.prefilter", prefilter, "none or float8 for train.kernels=triton")
    if tf32 and prefilter == "float8":
        raise ConfigError("train.prefilter", prefilter, "none with train.compute_dtype=tf32")
    return TritonKernels(
        compute_dtype, "tf32" if tf32 else "ieee", float8_prefilter=prefilter == "float8"
    )


def _is_empty(B: int, L: int, k: int) -> bool:
    """Check the sizes, and return True if there is nothing to select.

    Raises:
        ShapeError: If k or L is out of range.
    """
    if not 0 <= k <= L < _LARGEST_LATENT:
        raise ShapeError(f"k={k}, L={L}: expected 0 <= k <= L < 2**31")
    return not B or not k


def _encoder(dtype: torch.dtype, precision: str, interpreted: bool) -> Encoder:
    from sae_core.kernels.triton.encoder import candidates, encode

    cut = candidates.INTERPRETER_TILES if interpreted else candidates.tiles(dtype, precision)
    return encode.Encoder(dtype, precision, cut, interpreted)


def _check_triton() -> bool:
    """Check that triton can run, and return True if it runs in its interpreter."""
    try:
        import triton
    except ImportError as error:
        raise ConfigError(
            "train.kernels",
            "triton",
            "triton to be installed",
            "run pip install triton, or use train.kernels=stock",
        ) from error
    interpreted = bool(triton.knobs.runtime.interpret)
    if not interpreted and not torch.cuda.is_available():
        raise ConfigError(
            "train.kernels",
            "triton",
            "a CUDA device",
            "use train.kernels=stock, or set TRITON_INTERPRET=1 in tests",
        )
    return interpreted


def _check_dtype(compute_dtype: torch.dtype, precision: str, interpreted: bool) -> None:
    if compute_dtype not in _DTYPES:
        raise ConfigError(
            "compute dtype", compute_dtype, "bfloat16, float16 or float32 for train.kernels=triton"
        )
    if precision not in ("ieee", "tf32"):
        raise ConfigError("precision", precision, "ieee or tf32")
    if interpreted and compute_dtype == torch.bfloat16:
        raise ConfigError(
            "compute dtype",
            compute_dtype,
            "float16 or float32 under TRITON_INTERPRET",
            "unset TRITON_INTERPRET (the interpreter multiplies bfloat16 as raw bit patterns)",
        )
