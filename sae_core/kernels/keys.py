"""Selection keys: int64 numbers that sort by value, then by lower latent.

Keys within a row are unique, so a selection by key has one correct result even where values tie.
"""

from __future__ import annotations

import math

import torch

_LATENT_MASK = 0x7FFFFFFF
EMPTY_KEY = -(1 << 63)
"""Key of an empty slot; sorts below the key of every pair."""
LARGEST_NETWORK = 4096
"""Largest pool width that a sorting network selects from; `torch.topk` selects from wider pools."""


def pack_keys(values: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
    """Pack values and latents into int64 keys that sort by value, then by lower latent.

    Args:
        values: float32, any shape; NaN of either sign sorts above +inf.
        latents: int64, same shape, below 2**31.
    """
    # Adding 0.0 turns -0.0 into 0.0, so that the two tie. abs() clears the sign of NaN.
    values = torch.where(values.isnan(), values.abs(), values + 0.0)
    bits = values.view(torch.int32)
    # Flipping the other bits of negative floats makes integer order agree with float order.
    ordered = (bits ^ ((bits >> 31) & _LATENT_MASK)).to(torch.int64)
    return (ordered << 32) | (_LATENT_MASK - latents)


def unpack_keys(keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the (values float32, latents int64) of keys; an empty key gives (-inf, 0)."""
    empty = keys == EMPTY_KEY
    ordered = (keys >> 32).to(torch.int32)
    values = (ordered ^ ((ordered >> 31) & _LATENT_MASK)).view(torch.float32)
    latents = _LATENT_MASK - (keys & _LATENT_MASK)
    return values.masked_fill(empty, float("-inf")), latents.masked_fill(empty, 0)


def pool_width(k: int) -> int:
    """Return the number of slots of a row's pool: room for k keys and those of the next segment.

    A segment has three times as many latents as all before it. If the latents' order is arbitrary,
    it appends 3 k keys on average, with a standard deviation of sqrt(12 k). The pool has room for
    5.8 standard deviations more than the average; rows that overflow are run again.
    """
    return max(128, 1 << math.ceil(math.log2(4 * k + 20 * math.sqrt(k) + 8)))
