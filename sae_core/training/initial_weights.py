"""Start training from the weights of another SAE instead of random ones."""

from __future__ import annotations

import warnings

import torch

from foundation.errors import ConfigError
from sae_core.architectures.base import SparseAutoencoder
from sae_core.architectures.registry import architecture_of
from sae_core.architectures.settings import SAEConfig
from sae_core.checkpoint.safetensors_file import rows_per_block
from sae_core.checkpoint.stored_sae import StoredSAE
from sae_core.peer_formats import open_set

_KEY = "train.init_from"
_UNIT = 0.01
"""Relative difference of a decoder row's norm from 1 above which rows are reported as scaled."""


def open_start(path: str, config: SAEConfig, d_model: int) -> StoredSAE:
    """Open the SAE that training starts from, and check that it fits.

    Args:
        path: Where it is: `train.init_from`.
        config: Settings of the SAE to train.
        d_model: Width of the activations.

    Raises:
        ConfigError: If there is no SAE, or it has another architecture, width or number of latents.
    """
    stored = open_set(_KEY, path)
    ours = (config.architecture, config.n_latents, d_model)
    theirs = (stored.config.architecture, stored.config.n_latents, stored.d_model)
    if ours != theirs:
        raise ConfigError(
            _KEY,
            path,
            "an SAE with sae.architecture={}, sae.n_latents={} and the width {} of the store; this "
            "one has {}, {} and {}".format(*ours, *theirs),
        )
    return stored


@torch.no_grad()
def start_from(sae: SparseAutoencoder, path: str) -> None:
    """Copy the weights of a trained SAE into a calibrated shard.

    The trained SAE reads raw activations. Its weights are written for the inputs that this SAE
    trains on, so that the reconstructions are the same. Decoder rows must have unit norm; those of
    another norm are scaled, and their encoder rows inversely, which may change which latents are
    selected. Each rank reads its own rows.

    Args:
        sae: The shard, after `calibrate`.
        path: Where the trained SAE is; see `open_start`.

    Raises:
        ConfigError: If there is no SAE that fits.
    """
    stored = open_start(path, sae.config, sae.d_model)
    scale = sae.input_scale.double().cpu()
    forward, backward = _maps_of(sae)
    b_dec = stored.b_dec.double()
    if forward is not None:
        b_dec = _mapped(b_dec - sae.input_center.double().cpu(), forward)
    sae.b_dec.copy_((b_dec - sae.input_mean.double().cpu()) * scale)
    n_scaled = 0
    n_rows, step = len(sae.W_dec), rows_per_block(8 * sae.d_model)
    for start in range(0, n_rows, step):
        own = slice(start, min(start + step, n_rows))
        there = (sae.first_latent + own.start, sae.first_latent + own.stop)
        W_dec = _mapped(stored.rows["W_dec"](*there).double(), forward)
        norms = W_dec.norm(dim=1).clamp_min(1e-30)
        n_scaled += int(((norms - 1).abs() > _UNIT).sum())
        sae.W_dec[own].copy_(W_dec / norms[:, None])
        W_enc = _mapped(stored.rows["W_enc"](*there).double(), backward)
        sae.W_enc[own].copy_(W_enc * norms[:, None])
        sae.b_enc[own].copy_(stored.rows["b_enc"](*there).double() * norms * scale)
        for vector in architecture_of(sae.config).vectors:
            values = stored.rows[vector.name](*there).double()
            factor = norms * scale if vector.in_activation_units else 1.0
            getattr(sae, vector.name)[own].copy_(values * factor)
    sae.weights_replaced()
    if n_scaled:
        warnings.warn(
            f"{_KEY}={path}: {n_scaled:,} of {n_rows:,} decoder rows did not have unit norm and "
            "were scaled, which may change which latents are selected",
            stacklevel=2,
        )


def _maps_of(sae: SparseAutoencoder) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Return the map of centred activations and its inverse, [D] or [D, D] float64, if any."""
    if sae.input_map is None:
        return None, None
    forward = sae.input_map.double().cpu()
    return forward, 1 / forward if forward.ndim == 1 else torch.linalg.inv(forward)


def _mapped(rows: torch.Tensor, map_: torch.Tensor | None) -> torch.Tensor:
    """Apply a map to rows [..., D] float64; None changes nothing."""
    if map_ is None:
        return rows
    return rows * map_ if map_.ndim == 1 else rows @ map_
