"""Fused encoder and TopK, without writing the [B, L] pre-activations.

Each row has a pool of selection keys. The first latents fill the pool. The remaining latents follow
in segments, each three times as wide as all latents before it. After each segment `select` reduces
the pool to its k largest keys and sets the row's threshold to the k-th value so far; the next
segment appends only keys of values above the threshold. Latents come in ascending order, so a value
equal to the threshold would lose the tie to an earlier latent, and a strict comparison is exact. A
row with more keys than its pool can hold is encoded again; see `overflow.py`.

A prefilter passes split rows: float8 columns, bfloat16 columns and a scale. The latents selected
from their product are candidates, which the prefilter then rescores exactly.
"""

# Triton ships no types.
# mypy: disable-error-code="import-untyped, import-not-found"

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from sae_core.kernels.interface import Subset
from sae_core.kernels.keys import pool_width, unpack_keys
from sae_core.kernels.triton.encoder.candidates import Candidate, TileConfig, Tiles, descriptors_fit
from sae_core.kernels.triton.encoder.filter import filter_kernel, keys_kernel
from sae_core.kernels.triton.encoder.overflow import overflow_grid, overflow_kernel, overflow_shape
from sae_core.kernels.triton.encoder.select import select
from sae_core.kernels.triton.launch import contiguous_columns
from sae_core.kernels.triton.prefilter_float8 import SplitRows
from sae_core.kernels.triton.quantise import FP8

_GROWTH = 4
"""Ratio of the latents seen after a segment to those seen before it."""
_COLUMNS = 16
"""Rows of other lengths are not aligned, and loading them makes the compiler spill registers."""


class Factors(NamedTuple):
    """The factors of an encoder product, and which of their rows take part."""

    x: SplitRows
    W: SplitRows
    b: torch.Tensor
    """[L] float32, contiguous."""
    rows: Subset | None
    """Rows of x; None means all of them."""
    among: Subset | None
    """Rows of W; None means all of them."""

    @property
    def operands(self) -> tuple[torch.Tensor, ...]:
        """First arguments of all kernels that call `tile_pre_acts`."""
        x, W = self.x, self.W
        return x.low, W.low, self.b, x.side, W.side, x.scales, W.scales

    @property
    def subsets(self) -> tuple[torch.Tensor | None, ...]:
        """Indices and size of the rows, then of the latents."""
        both = (self.rows, self.among)
        return tuple(part for subset in both for part in (subset or (None, None)))

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """D, the number of side columns, and the strides of rows of x and W."""
        x, W = self.x, self.W
        return x.low.shape[1], x.side.shape[1], x.low.stride(0), W.low.stride(0)


class Pools(NamedTuple):
    """The keys that may still be selected, for B rows; see `select`."""

    keys: torch.Tensor
    """[B, width] int64."""
    counts: torch.Tensor
    """[B] int32: number of appended keys."""
    thresholds: torch.Tensor
    """[B] float32: value of the k-th key so far."""
    overflow: torch.Tensor
    """[B] int32: 1 for rows that lost keys."""


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

    def with_few(self, candidate: Candidate) -> Encoder:
        """Return this encoder with another candidate for segments with few keys per tile."""
        return replace(self, tiles=replace(self.tiles, few=candidate))

    def topk(
        self,
        x: torch.Tensor,
        W_enc: torch.Tensor,
        b_enc: torch.Tensor,
        k: int,
        rows: Subset | None = None,
        among: Subset | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `TritonKernels.exact_topk`."""
        return self.topk_split(self._plain(x), self._plain(W_enc), b_enc, k, rows, among)

    def topk_split(
        self,
        x: SplitRows,
        W_enc: SplitRows,
        b_enc: torch.Tensor,
        k: int,
        rows: Subset | None = None,
        among: Subset | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run `topk` on rows in the product's format: split rows, or those made by `_plain`."""
        B = len(x.low)
        L = len(W_enc.low)
        width = pool_width(k)
        device = x.low.device
        factors = Factors(x, W_enc, b_enc.float().contiguous(), rows, among)
        stop = min(width, L)
        pools = Pools(
            torch.empty(B, width, dtype=torch.int64, device=device),
            torch.full((B,), stop, dtype=torch.int32, device=device),
            torch.empty(B, dtype=torch.float32, device=device),
            torch.zeros(B, dtype=torch.int32, device=device),
        )
        if rows is not None:
            # Nothing is selected for the other rows.
            is_member = torch.arange(B, device=device) < rows.size
            pools.counts.index_copy_(0, rows.indices, (stop * is_member).to(torch.int32))
        tile = self.tiles.many.tile
        keys_kernel[tile.grid(B, stop)](
            *factors.operands, pools.keys, *factors.subsets, B, stop, *factors.sizes, width,
            **self._options(tile),
        )  # fmt: skip
        select(*pools, k)
        while stop < L:
            start, stop = stop, min(_GROWTH * stop, L)
            # k of the `start` latents seen so far reached a row's threshold, so a tile is expected
            # to bring k * BN / start keys per row.
            few = self.tiles.few
            many = k * few.tile.BN > few.most_keys * start
            self.filter(self.tiles.many if many else few, factors, start, stop, pools)
            if stop == L:
                overflow_kernel[overflow_grid(B)](
                    *factors.operands, pools.keys, pools.counts, pools.overflow,
                    *factors.subsets[2:], B, L, *factors.sizes, k, width, **self._flags(),
                    **overflow_shape(tile.BK),
                )  # fmt: skip
            select(*pools, k)
        return unpack_keys(pools.keys[:, :k])

    def filter(
        self, candidate: Candidate, factors: Factors, first: int, stop: int, pools: Pools
    ) -> None:
        """Append the keys of a segment's values above each row's threshold to the row's pool.

        Args:
            candidate: How to run the kernel; loads fall back to pointers where descriptors cannot
                address the rows.
            factors: Factors of the product.
            first: First latent of the segment, or its position in the subset.
            stop: End of the segment.
            pools: Pools and thresholds of the rows. Keys past a pool's width are counted but lost.
        """
        x, W = factors.x.low, factors.W.low
        whole = factors.rows is None and factors.among is None
        if not whole or (candidate.descriptors and not descriptors_fit(x, W)):
            candidate = candidate.with_pointers
        tile = candidate.tile
        operands: list[torch.Tensor | TensorDescriptor] = list(factors.operands)
        if candidate.descriptors:
            # Made by the host: descriptors made by the kernel need scratch memory on the device.
            operands[0] = TensorDescriptor.from_tensor(x, [tile.BM, tile.BK])
            operands[1] = TensorDescriptor.from_tensor(W, [tile.BN, tile.BK])
        grid = tile.grid(len(x), stop - first)
        if candidate.persistent:
            grid = (min(grid[0], candidate.persistent * _multiprocessors(x.device)),)
        filter_kernel[grid](
            *operands, pools.thresholds, pools.keys, pools.counts, *factors.subsets, len(x), first,
            stop, *factors.sizes, pools.keys.shape[1], **candidate.flags(),
            **self._options(tile),
        )  # fmt: skip

    def _options(self, tile: TileConfig) -> dict[str, int | str]:
        return {**self._flags(), **tile.options()}

    def _flags(self) -> dict[str, int | str]:
        split = self.dtype == FP8
        flags = {"SPLIT": split, "WIDEN": split and self.interpreted}
        return {"PRECISION": self.precision, **flags}

    def _plain(self, matrix: torch.Tensor) -> SplitRows:
        """Wrap a matrix as `SplitRows`, with empty side and scales that no kernel reads."""
        return plain_rows(contiguous_columns(matrix.to(self.dtype)))


def plain_rows(matrix: torch.Tensor) -> SplitRows:
    """Wrap a matrix as `SplitRows`, with empty side and scales that no kernel reads.

    Rows get zeros up to a multiple of `_COLUMNS`, which copies the matrix if there are any to add.
    """
    missing = -matrix.shape[1] % _COLUMNS
    if missing:
        matrix = torch.nn.functional.pad(matrix, (0, missing))
    # Of the dtypes that split rows have, so that no kernel is compiled for others.
    side = torch.empty(len(matrix), 0, dtype=torch.bfloat16, device=matrix.device)
    return SplitRows(matrix, side, torch.empty(0, device=matrix.device))


@cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 2  # the interpreter runs one program after another
    return torch.cuda.get_device_properties(device).multi_processor_count
