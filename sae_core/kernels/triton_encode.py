"""Encoder and TopK in one: which latents a row keeps, without the [B, L] pre-activations.

A row has a pool of keys. The first latents fill it; after each segment of latents `select` leaves
the k largest and the row's threshold, the k-th value so far. The next segment, three times as wide
as all before it, appends what is above. Since segments ascend, a later latent that only equals the
threshold loses the tie, so "above" is exact. A row that was offered more keys than its pool holds
is run again with every key kept.

In float8 the rows of both matrices come with a scale each, and the selection is that of the rounded
product: candidates, for somebody to compute exactly.
"""

# Triton has no types.
# mypy: disable-error-code="import-untyped, import-not-found"

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton

from sae_core.kernels.keys import EMPTY_KEY, unpack_keys
from sae_core.kernels.triton_filter import filter_kernel, keys_kernel
from sae_core.kernels.triton_launch import FP_FUSION, plain_rows
from sae_core.kernels.triton_quantise import FP8, quantise_rows
from sae_core.kernels.triton_select import pool_width, select

_GROWTH = 4
"""Latents seen after a segment, over those seen before it."""
_RERUN_KEYS = 1 << 26
"""Keys written at once (512 MiB) for rows that are run again."""


@dataclass(frozen=True)
class TileConfig:
    """How one program's tile is cut."""

    BM: int
    """Batch rows."""
    BN: int
    """Latents."""
    BK: int
    """Columns of d_model per load."""
    num_warps: int
    num_stages: int
    GROUP: int = 8
    """Row blocks whose programs run side by side, so that they share the latents' rows in L2."""

    def options(self) -> dict[str, int]:
        """Keyword arguments of a launch."""
        return {**vars(self), **FP_FUSION}

    def grid(self, n_rows: int, n_latents: int) -> tuple[int]:
        """Programs that cover so many rows and latents."""
        return (triton.cdiv(n_rows, self.BM) * triton.cdiv(n_latents, self.BN),)


@dataclass(frozen=True)
class Tiles:
    """The tiles of one dtype."""

    few: TileConfig
    """Where a row has at most about one key to append per tile: nearly all of the product."""
    many: TileConfig
    """Where it has more, or every key is written. Same BK: the same order of summation."""


INTERPRETER_TILES = Tiles(TileConfig(32, 64, 32, 4, 1, GROUP=2), TileConfig(32, 32, 32, 4, 1))
"""Small, so that the tests' sizes span several tiles."""


def tiles(dtype: torch.dtype, precision: str) -> Tiles:
    """The tiles for sm_90: two programs per multiprocessor, so that one's epilogue runs beside the
    other's product, and no spills. Compiled and read, not yet timed."""
    if dtype == FP8:
        return Tiles(TileConfig(128, 128, 128, 4, 3), TileConfig(128, 64, 128, 4, 3))
    if dtype != torch.float32:
        return Tiles(TileConfig(128, 128, 64, 4, 3), TileConfig(128, 64, 64, 4, 3))
    if precision == "tf32":
        return Tiles(TileConfig(128, 128, 32, 4, 3), TileConfig(128, 64, 32, 4, 3))
    tile = TileConfig(64, 64, 32, 4, 3)
    return Tiles(tile, tile)


@dataclass(frozen=True)
class Encoder:
    """Encodes in one dtype.

    Args:
        dtype: of the product's inputs; sums are float32. `FP8` rounds rows to a scale of their own.
        precision: "ieee" or "tf32", for float32 inputs.
        tiles: how programs are cut.
        interpreted: whether Triton's interpreter runs it, which cannot multiply float8.
    """

    dtype: torch.dtype
    precision: str
    tiles: Tiles
    interpreted: bool

    def topk(
        self, x: torch.Tensor, W_enc: torch.Tensor, b_enc: torch.Tensor, k: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Kernels.encode_topk`; within a row descending, ties by ascending latent."""
        B, L, width = x.shape[0], W_enc.shape[0], pool_width(k)
        inputs, b_enc = self._operand(x), b_enc.float().contiguous()
        pool = torch.empty(B, width, dtype=torch.int64, device=x.device)
        stop = min(width, L)
        counts = torch.full((B,), stop, dtype=torch.int32, device=x.device)
        threshold = torch.empty(B, dtype=torch.float32, device=x.device)
        overflow = torch.zeros(B, dtype=torch.int32, device=x.device)
        self._write_keys(inputs, W_enc[:stop], b_enc[:stop], 0, pool)
        select(pool, counts, threshold, overflow, k)
        while stop < L:
            start, stop = stop, min(_GROWTH * stop, L)
            W, b = self._operand(W_enc[start:stop]), b_enc[start:stop]
            # The expected number of a row's keys in a tile: k of `start` were above so far.
            many = k * self.tiles.few.BN > start
            tile = self.tiles.many if many else self.tiles.few
            filter_kernel[tile.grid(B, stop - start)](
                inputs.rows, W.rows, b, inputs.scales, W.scales, threshold, pool, counts, B,
                stop - start, start, x.shape[1], inputs.rows.stride(0), W.rows.stride(0),
                WIDTH=width, MANY=many, **self._options(tile),
            )  # fmt: skip
            select(pool, counts, threshold, overflow, k)
        best = pool[:, :k]
        lost = overflow.nonzero().squeeze(1)
        if len(lost):
            again = _Operand(inputs.rows[lost], inputs.scales[lost])
            best[lost] = self._run_again(again, W_enc, b_enc, k)
        return unpack_keys(best)

    def _run_again(
        self, x: _Operand, W_enc: torch.Tensor, b_enc: torch.Tensor, k: int
    ) -> torch.Tensor:
        """[R, k] keys of rows whose pool was too small: all keys, a piece of latents at a time."""
        R, device = len(x.rows), x.rows.device
        best = torch.full((R, k), EMPTY_KEY, dtype=torch.int64, device=device)
        size = max(k, _RERUN_KEYS // R)
        for start in range(0, W_enc.shape[0], size):
            W, b = W_enc[start : start + size], b_enc[start : start + size]
            keys = torch.empty(R, len(W), dtype=torch.int64, device=device)
            self._write_keys(x, W, b, start, keys)
            best = torch.cat((best, keys), 1).topk(k, dim=1).values
        return best

    def _write_keys(
        self, x: _Operand, W_enc: torch.Tensor, b: torch.Tensor, first: int, out: torch.Tensor
    ) -> None:
        W, tile = self._operand(W_enc), self.tiles.many
        n_rows, D = x.rows.shape
        keys_kernel[tile.grid(n_rows, len(b))](
            x.rows, W.rows, b, x.scales, W.scales, out, n_rows, len(b), first, D,
            x.rows.stride(0), W.rows.stride(0), out.stride(0), **self._options(tile),
        )  # fmt: skip

    def _options(self, tile: TileConfig) -> dict[str, int | str]:
        scaled = self.dtype == FP8
        flags = {"SCALED": scaled, "WIDEN": scaled and self.interpreted}
        return {"PRECISION": self.precision, **flags, **tile.options()}

    def _operand(self, matrix: torch.Tensor) -> _Operand:
        if self.dtype == FP8:
            return _Operand(*quantise_rows(matrix))
        none = torch.empty(len(matrix), 0, device=matrix.device)
        return _Operand(plain_rows(matrix.to(self.dtype)), none)


class _Operand(NamedTuple):
    """A matrix as the product takes it."""

    rows: torch.Tensor
    """[n, D], a row's columns side by side."""
    scales: torch.Tensor
    """[n] float32 in float8; otherwise [n, 0], which no kernel reads."""
