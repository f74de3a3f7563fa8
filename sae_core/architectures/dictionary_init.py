"""Initial dictionaries."""

from __future__ import annotations

import hashlib

import torch

_BLOCK_ROWS = 1024
"""Number of dictionary rows drawn from each random generator."""


def random_unit_rows(start: int, stop: int, d_model: int, seed: int) -> torch.Tensor:
    """Draw rows [start, stop) of the initial dictionary, [stop - start, D] float32.

    Each block of rows has its own generator, so the rows do not depend on the sharding, and a rank
    draws only the blocks that it needs.
    """
    # torch uses only 32 bits of a seed on the CPU. Hash the seed, so that runs with nearby seeds
    # share no blocks, and number the blocks consecutively, so that blocks of the same run never
    # collide.
    base = int.from_bytes(hashlib.sha256(str(seed).encode()).digest()[:4])
    blocks = []
    for block in range(start // _BLOCK_ROWS, -(-stop // _BLOCK_ROWS)):
        generator = torch.Generator().manual_seed((base + block) % 2**32)
        blocks.append(torch.randn(_BLOCK_ROWS, d_model, generator=generator))
    first = start // _BLOCK_ROWS * _BLOCK_ROWS
    rows = torch.cat(blocks)[start - first : stop - first]
    return torch.nn.functional.normalize(rows, dim=1)
