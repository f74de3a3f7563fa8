"""Encoder GEMM whose epilogue keeps only what can still be selected: [B, L] is never written.

A row has a pool of keys. The first latents fill it; after each segment of latents `select` leaves
the k largest and the row's threshold, the k-th value so far. The next segment, three times as wide
as all before it, appends what is above. Since segments ascend, a later latent that only equals the
threshold loses the tie, so "above" is exact. A row that was offered more keys than its pool holds
is run again with every key kept. All paths share one tile product, so a pre-activation has the
same bits whichever of them computed it.
"""

# Triton has no types, and a kernel's arguments none that mypy knows.
# mypy: disable-error-code="no-untyped-def, import-untyped, import-not-found"

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from sae_core.kernels.keys import EMPTY_KEY, unpack_keys
from sae_core.kernels.triton_select import pack_key, pool_width, select

_NONE = tl.constexpr(0x7FFFFFFF)
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
        return dict(vars(self))

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
    if dtype != torch.float32:
        return Tiles(TileConfig(128, 128, 64, 4, 3), TileConfig(128, 64, 64, 4, 3))
    if precision == "tf32":
        return Tiles(TileConfig(128, 128, 32, 4, 3), TileConfig(128, 64, 32, 4, 3))
    tile = TileConfig(64, 64, 32, 4, 3)
    return Tiles(tile, tile)


@triton.jit
def _block_of(pid, n_rows, n_latents, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr):
    """(row block, latent block): GROUP row blocks walk over the latents together."""
    row_blocks = tl.cdiv(n_rows, BM)
    per_group = GROUP * tl.cdiv(n_latents, BN)
    first = (pid // per_group) * GROUP
    size = tl.minimum(row_blocks - first, GROUP)
    within = pid % per_group
    return first + within % size, within // size


@triton.jit
def _tile_pre_acts(
    x, W, b, rows, columns, n_rows, n_latents, D, x_stride, W_stride,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """[BM, BN] fp32 pre-activations; what lies outside is to be masked by the caller."""
    # int64: a row times its stride passes 2**31 in a dictionary of a million latents.
    x_rows = x + tl.where(rows < n_rows, rows, 0).to(tl.int64)[:, None] * x_stride
    W_rows = W + tl.where(columns < n_latents, columns, 0).to(tl.int64)[None, :] * W_stride
    depth = tl.arange(0, BK)
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    for start in range(0, D, BK):
        left = depth < D - start
        x_tile = tl.load(x_rows + (start + depth)[None, :], mask=left[None, :], other=0.0)
        W_tile = tl.load(W_rows + (start + depth)[:, None], mask=left[:, None], other=0.0)
        acc = tl.dot(x_tile, W_tile, acc, input_precision=PRECISION)
    return acc + tl.load(b + columns, mask=columns < n_latents, other=0.0)[None, :]


@triton.jit
def keys_kernel(
    x, W, b, out, n_rows, n_latents, first_latent, D, x_stride, W_stride, out_stride,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Every key of a narrow segment: out [n_rows, n_latents] int64."""
    row_block, block = _block_of(tl.program_id(0), n_rows, n_latents, BM, BN, GROUP)
    rows = row_block * BM + tl.arange(0, BM)
    columns = block * BN + tl.arange(0, BN)
    acc = _tile_pre_acts(
        x, W, b, rows, columns, n_rows, n_latents, D, x_stride, W_stride, BM, BN, BK, PRECISION
    )
    keys = pack_key(acc, (first_latent + columns)[None, :])
    inside = (rows < n_rows)[:, None] & (columns < n_latents)[None, :]
    tl.store(out + rows.to(tl.int64)[:, None] * out_stride + columns[None, :], keys, mask=inside)


@triton.jit
def _halves(tile, BM: tl.constexpr, BN: tl.constexpr):
    """The left and the right half of a tile's columns."""
    return tl.split(tl.permute(tl.reshape(tile, (BM, 2, BN // 2)), (0, 2, 1)))


@triton.jit
def _quarters(tile, BM: tl.constexpr, BN: tl.constexpr):
    """A tile's columns in four parts, from left to right."""
    left, right = _halves(tile, BM, BN)
    first, second = _halves(left, BM, BN // 2)
    third, fourth = _halves(right, BM, BN // 2)
    return first, second, third, fourth


@triton.jit
def _append_all(
    tile, rows, columns, limit, pool, counts, n_rows, n_latents, first_latent, WIDTH: tl.constexpr
):
    """Appends what is above, every place of the tile on its own; for tiles with many such."""
    hit = (tile <= limit[:, None]) == 0
    hit = hit & (rows < n_rows)[:, None] & (columns < n_latents)[None, :]
    counters = counts + rows[:, None] + tl.zeros_like(columns)[None, :]
    slot = tl.atomic_add(counters, 1, mask=hit, sem="relaxed")
    keys = pack_key(tile, (first_latent + columns)[None, :])
    place = pool + rows.to(tl.int64)[:, None] * WIDTH + slot
    tl.store(place, keys, mask=hit & (slot < WIDTH))


@triton.jit
def _append_few(
    tile, rows, columns, limit, pool, counts, n_rows, n_latents, first_latent, WIDTH: tl.constexpr
):
    """Appends what is above, one column per row and turn; for tiles with hardly any."""
    # A latent outside is "none", and so is every latent of a row outside.
    column = tl.where(columns < n_latents, columns, _NONE)[None, :]
    found = _first_above(tile, column, limit, rows < n_rows)
    while tl.min(found, 0) < _NONE:
        here = column == found[:, None]
        value = tl.sum(tl.where(here, tile, 0.0), 1)
        hit = found < _NONE
        slot = tl.atomic_add(counts + rows, 1, mask=hit, sem="relaxed")
        place = pool + rows.to(tl.int64) * WIDTH + slot
        tl.store(place, pack_key(value, first_latent + found), mask=hit & (slot < WIDTH))
        # Taken out of the tile: a memory of what was above would cost as many registers again.
        tile = tl.where(here, float("-inf"), tile)
        found = _first_above(tile, column, limit, rows < n_rows)


@triton.jit
def _first_above(tile, column, limit, inside):
    first = tl.min(tl.where(tile <= limit[:, None], _NONE, column), 1)
    return tl.where(inside, first, _NONE)


@triton.jit
def filter_kernel(
    x, W, b, threshold, pool, counts, n_rows, n_latents, first_latent, D, x_stride, W_stride,
    WIDTH: tl.constexpr, MANY: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, GROUP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Appends to pool [n_rows, WIDTH] what is above threshold [n_rows]; counts [n_rows] goes on
    counting past WIDTH, which marks the row as lost.

    Which slot a key gets is a race; which keys there are is not, and `select` heeds no slot.
    "Above" is "not at most": NaN has to pass, a maximum would drop it without a word.
    """
    row_block, block = _block_of(tl.program_id(0), n_rows, n_latents, BM, BN, GROUP)
    rows = row_block * BM + tl.arange(0, BM)
    columns = block * BN + tl.arange(0, BN)
    acc = _tile_pre_acts(
        x, W, b, rows, columns, n_rows, n_latents, D, x_stride, W_stride, BM, BN, BK, PRECISION
    )
    limit = tl.load(threshold + rows, mask=rows < n_rows, other=float("inf"))
    if MANY:
        # In quarters, so that the slots and addresses of one need not live beside all others.
        quarters = _quarters(acc, BM, BN)
        for i in tl.static_range(4):
            part = block * BN + i * (BN // 4) + tl.arange(0, BN // 4)
            _append_all(
                quarters[i], rows, part, limit, pool, counts, n_rows, n_latents, first_latent,
                WIDTH,
            )  # fmt: skip
    else:
        _append_few(acc, rows, columns, limit, pool, counts, n_rows, n_latents, first_latent, WIDTH)


@dataclass(frozen=True)
class Encoder:
    """Encodes in one dtype.

    Args:
        dtype: of the product's inputs; sums are float32.
        precision: "ieee" or "tf32", for float32 inputs.
        tiles: how programs are cut.
    """

    dtype: torch.dtype
    precision: str
    tiles: Tiles

    def topk(
        self, x: torch.Tensor, W_enc: torch.Tensor, b_enc: torch.Tensor, k: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Kernels.encode_topk`; within a row descending, ties by ascending latent."""
        B, L, width = x.shape[0], W_enc.shape[0], pool_width(k)
        x, b_enc = x.to(self.dtype).contiguous(), b_enc.float().contiguous()
        pool = torch.empty(B, width, dtype=torch.int64, device=x.device)
        stop = min(width, L)
        counts = torch.full((B,), stop, dtype=torch.int32, device=x.device)
        threshold = torch.empty(B, dtype=torch.float32, device=x.device)
        overflow = torch.zeros(B, dtype=torch.int32, device=x.device)
        self._write_keys(x, W_enc[:stop], b_enc[:stop], 0, pool)
        select(pool, counts, threshold, overflow, k)
        while stop < L:
            start, stop = stop, min(_GROWTH * stop, L)
            W, b = self._rows(W_enc[start:stop]), b_enc[start:stop]
            # The expected number of a row's keys in a tile: k of `start` were above so far.
            many = k * self.tiles.few.BN > start
            tile = self.tiles.many if many else self.tiles.few
            filter_kernel[tile.grid(B, stop - start)](
                x, W, b, threshold, pool, counts, B, stop - start, start, x.shape[1],
                x.stride(0), W.stride(0), WIDTH=width, MANY=many, PRECISION=self.precision,
                **tile.options(),
            )  # fmt: skip
            select(pool, counts, threshold, overflow, k)
        best = pool[:, :k]
        lost = overflow.nonzero().squeeze(1)
        if len(lost):
            best[lost] = self._run_again(x[lost], W_enc, b_enc, k)
        return unpack_keys(best)

    def _run_again(
        self, x: torch.Tensor, W_enc: torch.Tensor, b_enc: torch.Tensor, k: int
    ) -> torch.Tensor:
        """[R, k] keys of rows whose pool was too small: all keys, a piece of latents at a time."""
        best = torch.full((len(x), k), EMPTY_KEY, dtype=torch.int64, device=x.device)
        size = max(k, _RERUN_KEYS // len(x))
        for start in range(0, W_enc.shape[0], size):
            W, b = W_enc[start : start + size], b_enc[start : start + size]
            keys = torch.empty(len(x), len(W), dtype=torch.int64, device=x.device)
            self._write_keys(x, W, b, start, keys)
            best = torch.cat((best, keys), 1).topk(k, dim=1).values
        return best

    def _write_keys(
        self, x: torch.Tensor, W: torch.Tensor, b: torch.Tensor, first: int, out: torch.Tensor
    ) -> None:
        W = self._rows(W)
        tile = self.tiles.many
        keys_kernel[tile.grid(len(x), len(W))](
            x, W, b, out, len(x), len(W), first, x.shape[1], x.stride(0), W.stride(0),
            out.stride(0), PRECISION=self.precision, **tile.options(),
        )  # fmt: skip

    def _rows(self, W: torch.Tensor) -> torch.Tensor:
        W = W.to(self.dtype)
        return W if W.stride(1) == 1 else W.contiguous()
