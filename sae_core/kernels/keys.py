"""Selection keys: int64 numbers that sort by value, then by lower latent.

Keys within a row are unique, so a selection by key has one correct result even where values tie.
"""

from __future__ import annotations

import torch

_LATENT_MASK = 0x7FFFFFFF
EMPTY_KEY = -(1 << 63)
"""Key of an empty slot; sorts below the key of every pair."""


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
