"""Fused encoder and TopK, without writing the [B, L] pre-activations.

Each row has a pool of selection keys. The first latents fill the pool. The remaining latents follow
in segments, each three times as wide as all latents before it. After each segment `select` reduces
the pool to its k largest keys and sets the row's threshold to the k-th value so far; the next
segment appends only keys of values above the threshold. Latents come in ascending order, so a value
equal to the threshold would lose the tie to an earlier latent, and a strict comparison is exact. A
row with more keys than its pool can hold is run again with all of its keys kept.

A prefilter passes split rows: float8 columns, bfloat16 columns and a scale. The latents selected
from their product are candidates, which the prefilter then rescores exactly.
"""

# Triton ships no types.
# mypy: disable-error-code="import-untyped, import-not-found"

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton

from sae_core.kernels.keys import EMPTY_KEY, unpack_keys
from sae_core.kernels.triton.filter import filter_kernel, keys_kernel
from sae_core.kernels.triton.launch import FP_FUSION, contiguous_columns
from sae_core.kernels.triton.prefilter_float8 import SplitRows
from sae_core.kernels.triton.quantise import FP8
from sae_core.kernels.triton.select import pool_width, select

_GROWTH = 4
"""Ratio of the latents seen after a segment to those seen before it."""
_RERUN_KEYS = 1 << 26
"""Keys per piece of latents (512 MiB) for rows that are run again."""


@dataclass(frozen=True)
class TileConfig:
    """Size of one program's tile and its launch options."""

    BM: int
    """Batch rows per tile."""
    BN: int
    """Latents per tile."""
    BK: int
    """Columns of d_model loaded at a time."""
    num_warps: int
    num_stages: int
    GROUP: int = 8
    """Row blocks whose programs run concurrently, to share rows of W_enc in the L2 cache."""

    def options(self) -> dict[str, int]:
        """Return the keyword arguments of a launch."""
        return {**vars(self), **FP_FUSION}

    def grid(self, n_rows: int, n_latents: int) -> tuple[int]:
        """Return the launch grid that covers this many rows and latents."""
        return (triton.cdiv(n_rows, self.BM) * triton.cdiv(n_latents, self.BN),)


@dataclass(frozen=True)
class Tiles:
    """Tile configurations for one dtype."""

    few: TileConfig
    """For segments in which a row appends at most about one key per tile: nearly all the work."""
    many: TileConfig
    """For segments with more keys, or where every key is written.

    BK must equal that of `few`, so that terms are added in the same order.
    """


INTERPRETER_TILES = Tiles(TileConfig(32, 64, 32, 4, 1, GROUP=2), TileConfig(32, 32, 32, 4, 1))
"""Tiles for Triton's interpreter: small, so that the tests' sizes span several tiles."""


def tiles(dtype: torch.dtype, precision: str) -> Tiles:
    """Return the tiles for sm_90.

    With these sizes, no registers spill and two programs fit on a multiprocessor. The epilogue of
    one program then overlaps with the product of the other. The sizes were chosen from the
    compiler's output and have not been timed.
    """
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
    """Encoder product and TopK in one dtype.

    Args:
        dtype: Dtype of the product's inputs; sums are float32. `FP8` takes split rows only.
        precision: How float32 inputs are multiplied, "ieee" or "tf32".
        tiles: Tile configurations.
        interpreted: True if kernels run in Triton's interpreter, which cannot multiply float8.
    """

    dtype: torch.dtype
    precision: str
    tiles: Tiles
    interpreted: bool

    def topk(
        self, x: torch.Tensor, W_enc: torch.Tensor, b_enc: torch.Tensor, k: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Kernels.encode_topk`; values descend within a row, and tied latents ascend."""
        return self.topk_split(self._plain(x), self._plain(W_enc), b_enc, k)

    def topk_split(
        self, x: SplitRows, W_enc: SplitRows, b_enc: torch.Tensor, k: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run `topk` on rows in the product's format: split rows, or those made by `_plain`."""
        B, D = x.low.shape
        L = len(W_enc.low)
        width = pool_width(k)
        device = x.low.device
        b_enc = b_enc.float().contiguous()
        pool = torch.empty(B, width, dtype=torch.int64, device=device)
        stop = min(width, L)
        counts = torch.full((B,), stop, dtype=torch.int32, device=device)
        threshold = torch.empty(B, dtype=torch.float32, device=device)
        overflow = torch.zeros(B, dtype=torch.int32, device=device)
        self._write_keys(x, _taken(W_enc, slice(stop)), b_enc[:stop], 0, pool)
        select(pool, counts, threshold, overflow, k)
        while stop < L:
            start, stop = stop, min(_GROWTH * stop, L)
            W = _taken(W_enc, slice(start, stop))
            b = b_enc[start:stop]
            # k of the `start` latents seen so far reached a row's threshold, so a tile is expected
            # to bring k * BN / start keys per row.
            many = k * self.tiles.few.BN > start
            tile = self.tiles.many if many else self.tiles.few
            filter_kernel[tile.grid(B, stop - start)](
                x.low, W.low, b, x.side, W.side, x.scales, W.scales, threshold, pool, counts, B,
                stop - start, start, D, x.side.shape[1], x.low.stride(0), W.low.stride(0),
                WIDTH=width, MANY=many, **self._options(tile),
            )  # fmt: skip
            select(pool, counts, threshold, overflow, k)
        best = pool[:, :k]
        lost = overflow.nonzero().squeeze(1)
        if len(lost):
            best[lost] = self._run_again(_taken(x, lost), W_enc, b_enc, k)
        return unpack_keys(best)

    def _run_again(
        self, x: SplitRows, W_enc: SplitRows, b_enc: torch.Tensor, k: int
    ) -> torch.Tensor:
        """Select again for rows whose pool overflowed, keeping every key of a piece of latents.

        Args:
            x: The R rows.
            W_enc: L rows.
            b_enc: [L] float32.
            k: Number to select.

        Returns:
            [R, k] int64 keys, descending.
        """
        R = len(x.low)
        device = x.low.device
        best = torch.full((R, k), EMPTY_KEY, dtype=torch.int64, device=device)
        size = max(k, _RERUN_KEYS // R)
        for start in range(0, len(W_enc.low), size):
            piece = slice(start, start + size)
            b = b_enc[piece]
            keys = torch.empty(R, len(b), dtype=torch.int64, device=device)
            self._write_keys(x, _taken(W_enc, piece), b, start, keys)
            best = torch.cat((best, keys), 1).topk(k, dim=1).values
        return best

    def _write_keys(
        self, x: SplitRows, W: SplitRows, b: torch.Tensor, first: int, out: torch.Tensor
    ) -> None:
        """Write to `out` the keys of all rows and all latents from `first` on."""
        tile = self.tiles.many
        n_rows, D = x.low.shape
        keys_kernel[tile.grid(n_rows, len(b))](
            x.low, W.low, b, x.side, W.side, x.scales, W.scales, out, n_rows, len(b), first, D,
            x.side.shape[1], x.low.stride(0), W.low.stride(0), out.stride(0),
            **self._options(tile),
        )  # fmt: skip

    def _options(self, tile: TileConfig) -> dict[str, int | str]:
        split = self.dtype == FP8
        flags = {"SPLIT": split, "WIDEN": split and self.interpreted}
        return {"PRECISION": self.precision, **flags, **tile.options()}

    def _plain(self, matrix: torch.Tensor) -> SplitRows:
        """Wrap a matrix as `SplitRows`, with empty side and scales that no kernel reads."""
        none = torch.empty(len(matrix), 0, device=matrix.device)
        return SplitRows(contiguous_columns(matrix.to(self.dtype)), none, none)


def _taken(rows: SplitRows, which: slice | torch.Tensor) -> SplitRows:
    """Return the rows that `which` selects."""
    return SplitRows(*(part[which] for part in rows))
