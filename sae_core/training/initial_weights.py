"""Start training from the weights of another SAE instead of random ones."""

from __future__ import annotations

import warnings

import torch

from foundation.errors import ConfigError
from sae_core.architectures.base import SparseAutoencoder
from sae_core.architectures.registry import architecture_of
from sae_core.checkpoint.safetensors_file import rows_per_block
from sae_core.checkpoint.stored_sae import StoredSAE

_KEY = "train.init_from"
_UNIT = 0.01
"""Relative difference of a decoder row's norm from 1 above which rows are said to be scaled."""


@torch.no_grad()
def start_from(sae: SparseAutoencoder, stored: StoredSAE, path: str) -> None:
    """Copy the weights of a trained SAE into a calibrated shard.

    The trained SAE reads raw activations. Its weights are written for the inputs that this SAE
    trains on, so that the reconstructions are the same. Decoder rows must have unit norm; those of
    another norm are scaled, and their encoder rows inversely, which may change which latents are
    selected. Each rank reads its own rows.

    Args:
        sae: The shard, after `calibrate`.
        stored: The trained SAE.
        path: Where it is, for messages.

    Raises:
        ConfigError: If it has another architecture, width or number of latents.
    """
    ours = (sae.config.architecture, sae.config.n_latents, sae.d_model)
    theirs = (stored.config.architecture, stored.config.n_latents, stored.d_model)
    if ours != theirs:
        raise ConfigError(
            _KEY,
            path,
            "an SAE with sae.architecture={}, sae.n_latents={} and the width {} of the store; this "
            "one has {}, {} and {}".format(*ours, *theirs),
        )
    scale = sae.input_scale.double().cpu()
    first, forward, backward = _map_of(sae)
    b_dec = (stored.b_dec.double() - first) @ forward
    sae.b_dec.copy_((b_dec - sae.input_mean.double().cpu()) * scale)
    n_scaled = 0
    n_rows, step = len(sae.W_dec), rows_per_block(8 * sae.d_model)
    for start in range(0, n_rows, step):
        own = slice(start, min(start + step, n_rows))
        there = (sae.first_latent + own.start, sae.first_latent + own.stop)
        W_dec = stored.rows["W_dec"](*there).double() @ forward
        norms = W_dec.norm(dim=1).clamp_min(1e-30)
        n_scaled += int(((norms - 1).abs() > _UNIT).sum())
        sae.W_dec[own].copy_(W_dec / norms[:, None])
        W_enc = stored.rows["W_enc"](*there).double() @ backward
        sae.W_enc[own].copy_(W_enc * norms[:, None])
        sae.b_enc[own].copy_(stored.rows["b_enc"](*there).double() * norms * scale)
        for vector in architecture_of(sae.config).vectors:
            values = stored.rows[vector.name](*there).double()
            factor = norms * scale if vector.in_activation_units else 1.0
            getattr(sae, vector.name)[own].copy_(values * factor)
    if n_scaled:
        warnings.warn(
            f"{_KEY}={path}: {n_scaled:,} of {n_rows:,} decoder rows did not have unit norm and "
            "were scaled, which may change which latents are selected",
            stacklevel=2,
        )


def _map_of(sae: SparseAutoencoder) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the centre [D] of the map of raw activations, the map and its inverse, [D, D]."""
    if sae.input_map is None:
        identity = torch.eye(sae.d_model, dtype=torch.float64)
        return torch.zeros(sae.d_model, dtype=torch.float64), identity, identity
    forward = sae.input_map.double().cpu()
    forward = torch.diag(forward) if forward.ndim == 1 else forward
    return sae.input_center.double().cpu(), forward, torch.linalg.inv(forward)
