"""Encoder GEMM whose epilogue keeps only what can still be selected: [B, L] is never written.

A row has a pool of keys. The first latents fill it; after each segment of latents `select` leaves
the k largest and the row's threshold, the k-th value so far. The next segment, three times as wide
as all before it, appends what is above. Since segments ascend, a later latent that only equals the
threshold loses the tie, so "above" is exact. A row that was offered more keys than its pool holds
is run again with every key kept. All paths share one tile product, so a pre-activation has the
same bits whichever of them computed it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from sae_core.kernels.keys import EMPTY_KEY, unpack_keys
from sae_core.kernels.triton_select import pack_key, pool_width, select

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


INTERPRETER_TILE = TileConfig(32, 64, 32, 4, 1, GROUP=2)
"""Small, so that the tests' sizes span several tiles."""


def tile_config(dtype: torch.dtype, precision: str) -> TileConfig:
    """The tile for sm_90; compiled and read, not yet timed."""
    if dtype != torch.float32:
        return TileConfig(128, 128, 64, 8, 3)
    if precision == "tf32":
        return TileConfig(128, 128, 32, 8, 3)
    return TileConfig(64, 64, 32, 4, 3)


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
def _append(
    tile, rows, first_column, threshold, pool, counts, n_rows, n_latents, first_latent,
    WIDTH: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Appends the keys of the tile's values that are above their row's threshold, or NaN."""
    columns = first_column + tl.arange(0, WIDE)
    # "not at most": NaN must pass, or a fused maximum would drop it without a word.
    hit = (tile <= threshold[:, None]) == 0
    hit = hit & (rows < n_rows)[:, None] & (columns < n_latents)[None, :]
    counters = counts + rows[:, None] + tl.zeros((1, WIDE), tl.int32)
    # Which slot a key gets is a race, which keys there are is not, and `select` looks at no slot.
    slot = tl.atomic_add(counters, 1, mask=hit, sem="relaxed")
    keys = pack_key(tile, (first_latent + columns)[None, :])
    where = pool + rows.to(tl.int64)[:, None] * WIDTH + slot
    tl.store(where, keys, mask=hit & (slot < WIDTH))


@triton.jit
def filter_kernel(
    x, W, b, threshold, pool, counts, n_rows, n_latents, first_latent, D, x_stride, W_stride,
    WIDTH: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    GROUP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Appends to pool [n_rows, WIDTH] what is above threshold [n_rows]; counts [n_rows] goes on
    counting past WIDTH, which marks the row as lost."""
    row_block, block = _block_of(tl.program_id(0), n_rows, n_latents, BM, BN, GROUP)
    rows = row_block * BM + tl.arange(0, BM)
    columns = block * BN + tl.arange(0, BN)
    acc = _tile_pre_acts(
        x, W, b, rows, columns, n_rows, n_latents, D, x_stride, W_stride, BM, BN, BK, PRECISION
    )
    limit = tl.load(threshold + rows, mask=rows < n_rows, other=float("inf"))
    above = ((acc <= limit[:, None]) == 0).to(tl.int32)
    if tl.max(tl.max(above, 1), 0) > 0:
        # In quarters, so that the slots and addresses of one need not live beside all others.
        left, right = _halves(acc, BM, BN)
        quarters = (*_halves(left, BM, BN // 2), *_halves(right, BM, BN // 2))
        for i in tl.static_range(4):
            _append(
                quarters[i], rows, block * BN + i * (BN // 4), limit, pool, counts,
                n_rows, n_latents, first_latent, WIDTH, BN // 4,
            )  # fmt: skip


@dataclass(frozen=True)
class Encoder:
    """Encodes in one dtype.

    Args:
        dtype: of the product's inputs; sums are float32.
        precision: "ieee" or "tf32", for float32 inputs.
        tile: how programs are cut.
    """

    dtype: torch.dtype
    precision: str
    tile: TileConfig

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
            filter_kernel[self._grid(B, stop - start)](
                x, W, b, threshold, pool, counts, B, stop - start, start, x.shape[1],
                x.stride(0), W.stride(0), WIDTH=width, PRECISION=self.precision,
                **self.tile.options(),
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
        size = max(self.tile.BN, _RERUN_KEYS // len(x))
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
        keys_kernel[self._grid(len(x), len(W))](
            x, W, b, out, len(x), len(W), first, x.shape[1], x.stride(0), W.stride(0),
            out.stride(0), PRECISION=self.precision, **self.tile.options(),
        )  # fmt: skip

    def _rows(self, W: torch.Tensor) -> torch.Tensor:
        W = W.to(self.dtype)
        return W if W.stride(1) == 1 else W.contiguous()

    def _grid(self, n_rows: int, n_latents: int) -> tuple[int]:
        return (triton.cdiv(n_rows, self.tile.BM) * triton.cdiv(n_latents, self.tile.BN),)
