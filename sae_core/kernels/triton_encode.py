"""Encoder and TopK in one: which latents a row keeps, without the [B, L] pre-activations.

A row has a pool of keys. The first latents fill it; after each segment of latents `select` leaves
the k largest and the row's threshold, the k-th value so far. The next segment, three times as wide
as all before it, appends what is above. Since segments ascend, a later latent that only equals the
threshold loses the tie, so "above" is exact. A row that was offered more keys than its pool holds
is run again with every key kept.

The prefilter's rows come split: columns in float8, some in bfloat16, and a scale. The selection is
that of their product: candidates, for somebody to compute exactly.
"""

# Triton has no types.
# mypy: disable-error-code="import-untyped, import-not-found"

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton

from sae_core.kernels.keys import EMPTY_KEY, unpack_keys
from sae_core.kernels.prefilter_float8 import SplitRows
from sae_core.kernels.triton_filter import filter_kernel, keys_kernel
from sae_core.kernels.triton_launch import FP_FUSION, plain_rows
from sae_core.kernels.triton_quantise import FP8
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
        dtype: of the product's inputs; sums are float32. `FP8` takes split rows only.
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
        return self.topk_of(self._plain(x), self._plain(W_enc), b_enc, k)

    def topk_of(
        self, x: SplitRows, W_enc: SplitRows, b_enc: torch.Tensor, k: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`topk` of rows as the product takes them: float8 ones, or those of `_plain`."""
        (B, D), L, width = x.low.shape, len(W_enc.low), pool_width(k)
        device, b_enc = x.low.device, b_enc.float().contiguous()
        pool = torch.empty(B, width, dtype=torch.int64, device=device)
        stop = min(width, L)
        counts = torch.full((B,), stop, dtype=torch.int32, device=device)
        threshold = torch.empty(B, dtype=torch.float32, device=device)
        overflow = torch.zeros(B, dtype=torch.int32, device=device)
        self._write_keys(x, _taken(W_enc, slice(stop)), b_enc[:stop], 0, pool)
        select(pool, counts, threshold, overflow, k)
        while stop < L:
            start, stop = stop, min(_GROWTH * stop, L)
            W, b = _taken(W_enc, slice(start, stop)), b_enc[start:stop]
            # The expected number of a row's keys in a tile: k of `start` were above so far.
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
        """[R, k] keys of rows whose pool was too small: all keys, a piece of latents at a time."""
        R, device = len(x.low), x.low.device
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
        tile, (n_rows, D) = self.tiles.many, x.low.shape
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
        """All in one part; no kernel reads the others."""
        none = torch.empty(len(matrix), 0, device=matrix.device)
        return SplitRows(plain_rows(matrix.to(self.dtype)), none, none)


def _taken(rows: SplitRows, which: slice | torch.Tensor) -> SplitRows:
    return SplitRows(*(part[which] for part in rows))
