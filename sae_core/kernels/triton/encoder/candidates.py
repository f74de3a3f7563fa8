"""Ways to run the encoder's kernels: tile sizes, loads and epilogues.

Nearly all of the encoder's time goes into segments in which a row appends roughly one key per tile
or fewer. Which way is fastest there depends on the GPU and the shape, so there are several
candidates; `choose.py` times them. All candidates of a dtype have the same BK and add the same
products in the same order. Under the interpreter the selected sets are equal, whichever is used;
that HGMMA and QGMMA give the same bits in tiles of different shapes is expected, but has not been
verified on hardware.
"""

# Triton ships no types.
# mypy: disable-error-code="import-untyped, import-not-found"

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
import triton

from sae_core.kernels.triton.launch import FP_FUSION
from sae_core.kernels.triton.quantise import FP8

_DESCRIPTOR_ALIGNMENT = 16
"""Bytes of which base addresses and row strides of tensor descriptors must be multiples."""


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
class Candidate:
    """One way to run `filter_kernel`. All select the same latents."""

    tile: TileConfig
    epilogue: Literal["all", "few", "inline"] = "inline"
    """How keys are appended. "inline" is PTX, which Triton's interpreter cannot run."""
    descriptors: bool = False
    """Load x and W_enc through tensor descriptors instead of pointers."""
    persistent: int = 0
    """Programs per multiprocessor that work through all tiles; 0 means one program per tile."""

    @property
    def label(self) -> str:
        """Name that is unique among the candidates of a dtype."""
        tile = self.tile
        size = f"{tile.BM}x{tile.BN}x{tile.BK} {tile.num_warps}w {tile.num_stages}s"
        loads = "descriptors" if self.descriptors else "pointers"
        return f"{size} {loads} {self.epilogue}{' persistent' if self.persistent else ''}"

    @property
    def most_keys(self) -> int:
        """Keys that a row may append to a tile, on average, for this candidate to be worth using.

        The inline epilogue takes a constant time per key; "few" takes a pass over the tile.
        """
        return 4 if self.epilogue == "inline" else 1

    @property
    def with_pointers(self) -> Candidate:
        """The candidate with the same tile and epilogue for rows that descriptors do not fit."""
        return replace(self, descriptors=False, persistent=0)

    def flags(self) -> dict[str, str | bool]:
        """Return the compile-time arguments of `filter_kernel` beyond those of the tile."""
        return {
            "EPILOGUE": self.epilogue,
            "DESCRIPTORS": self.descriptors,
            "PERSISTENT": self.persistent > 0,
        }


@dataclass(frozen=True)
class Tiles:
    """Tile configurations for the segments of one dtype."""

    few: Candidate
    """For segments in which a row appends few keys per tile; see `Candidate.most_keys`."""
    many: Candidate
    """For segments with more keys. Its tile is also used where every key is written.

    BK must equal that of `few`, so that terms are added in the same order.
    """


INTERPRETER_TILES = Tiles(
    Candidate(TileConfig(32, 64, 32, 4, 1, GROUP=2), "few"),
    Candidate(TileConfig(32, 32, 32, 4, 1), "all"),
)
"""Tiles for Triton's interpreter: small, so that the tests' sizes span several tiles."""


def candidates(dtype: torch.dtype, precision: str) -> tuple[Candidate, ...]:
    """Return the candidates for segments with few keys per tile, the default one first.

    With these sizes, no registers spill on sm_90. The default loads through pointers, which fit
    every matrix. Two of its programs fit on a multiprocessor, so that the epilogue of one overlaps
    with the product of the other. The order was chosen from the compiler's output, not from times.
    """
    if dtype == FP8:
        square = TileConfig(128, 128, 128, 4, 3)
        return (
            Candidate(square),
            Candidate(square, descriptors=True),
            Candidate(TileConfig(128, 128, 128, 8, 3), descriptors=True),
            Candidate(TileConfig(64, 128, 128, 4, 3), descriptors=True),
            Candidate(TileConfig(128, 64, 128, 4, 3), "few"),
        )
    if dtype == torch.float32 and precision == "ieee":
        square = TileConfig(64, 64, 32, 4, 3)
        return Candidate(square), Candidate(square, "few")
    BK = 32 if dtype == torch.float32 else 64
    square, wide = TileConfig(128, 128, BK, 4, 3), TileConfig(128, 256, BK, 8, 4)
    return (
        Candidate(square),
        Candidate(square, descriptors=True),
        Candidate(wide),
        Candidate(wide, descriptors=True),
        Candidate(square, descriptors=True, persistent=2),
        Candidate(wide, descriptors=True, persistent=1),
        Candidate(square, "few"),
    )


def tiles(dtype: torch.dtype, precision: str) -> Tiles:
    """Return the tiles that are used unless another candidate was chosen; see `candidates`."""
    few = candidates(dtype, precision)[0]
    many = few.tile
    if many.BN > 64:
        many = replace(many, BN=64)
    return Tiles(few, Candidate(many, "all"))


def descriptors_fit(*matrices: torch.Tensor) -> bool:
    """Return True if tensor descriptors can address the rows of all matrices."""
    return all(
        matrix.numel() > 0
        and matrix.stride(1) == 1
        and matrix.data_ptr() % _DESCRIPTOR_ALIGNMENT == 0
        and matrix.stride(0) * matrix.element_size() % _DESCRIPTOR_ALIGNMENT == 0
        for matrix in matrices
    )
