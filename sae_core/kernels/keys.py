"""Selection keys: an int64 orders by value, then by lower latent, so that ties have one answer."""

from __future__ import annotations

import torch

_LATENT_MASK = 0x7FFFFFFF
EMPTY_KEY = -(1 << 63)
"""Sorts below the key of every real pair."""


def pack_keys(values: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
    """int64 keys whose order is that of the values, then of the lower latent index.

    Args:
        values: float32, any shape; NaN of either sign sorts above +inf.
        latents: int64, same shape, below 2**31.
    """
    # Adding 0.0 makes -0.0 equal to 0.0, as it compares; abs() gives every NaN the positive sign.
    values = torch.where(values.isnan(), values.abs(), values + 0.0)
    bits = values.view(torch.int32)
    ordered = (bits ^ ((bits >> 31) & _LATENT_MASK)).to(torch.int64)
    return (ordered << 32) | (_LATENT_MASK - latents)


def unpack_keys(keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(values float32, latents int64) of keys; an empty slot gives (-inf, 0)."""
    empty = keys == EMPTY_KEY
    ordered = (keys >> 32).to(torch.int32)
    values = (ordered ^ ((ordered >> 31) & _LATENT_MASK)).view(torch.float32)
    latents = _LATENT_MASK - (keys & _LATENT_MASK)
    return values.masked_fill(empty, float("-inf")), latents.masked_fill(empty, 0)
