"""Rows of other libraries' SAEs, rewritten so that our inference computes what theirs does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from sae_core.architectures.registry import ARCHITECTURES
from sae_core.architectures.settings import SAEConfig
from sae_core.checkpoint.stored_sae import Rows


def settings_of(architecture: str, n_latents: Any, hookpoint: Any, k: Any = None) -> SAEConfig:
    """Return the settings of an SAE from the values of another library's config.

    Args:
        architecture: Our name of the architecture.
        n_latents: Number of latents.
        hookpoint: Hookpoint; ignored if it is not text.
        k: Number of active latents, which topk needs.

    Raises:
        ValueError: If a number is not a whole number.
    """
    numbers: dict[str, Any] = {"n_latents": n_latents}
    if architecture == "topk":
        numbers["k"] = int(k) if isinstance(k, float) and k.is_integer() else k
    if any(type(value) is not int for value in numbers.values()):
        found = ", ".join(f"{name}={value!r:.40}" for name, value in numbers.items())
        raise ValueError(f"{found}: expected whole numbers")
    name = hookpoint if isinstance(hookpoint, str) else None
    return ARCHITECTURES[architecture].settings(hookpoint=name, **numbers)


def with_unit_decoder(rows: Mapping[str, Rows]) -> dict[str, Rows]:
    """Return rows of an SAE with unit decoder rows whose latents are scaled by the original norms.

    Such an SAE selects the latents with the largest norm times pre-activation, and reconstructs the
    same.
    """
    decoder = rows["W_dec"]

    def norms(start: int, stop: int) -> torch.Tensor:
        return decoder(start, stop).norm(dim=1).clamp_min(1e-30)

    return {
        "W_enc": lambda start, stop: rows["W_enc"](start, stop) * norms(start, stop)[:, None],
        "b_enc": lambda start, stop: rows["b_enc"](start, stop) * norms(start, stop),
        "W_dec": lambda start, stop: decoder(start, stop) / norms(start, stop)[:, None],
    }


def with_subtracted_bias(rows: Mapping[str, Rows], b_dec: torch.Tensor) -> dict[str, Rows]:
    """Return rows for an encoder that subtracts `b_dec`, from those of one that does not.

    Args:
        rows: Rows of W_enc and of the biases.
        b_dec: [D] float32.
    """

    def added(start: int, stop: int) -> torch.Tensor:
        return rows["W_enc"](start, stop) @ b_dec

    found = dict(rows)
    found["b_enc"] = lambda start, stop: rows["b_enc"](start, stop) + added(start, stop)
    if "b_mag" in rows:  # of a Gated SAE, whose magnitudes scale the product
        found["b_mag"] = lambda start, stop: (
            rows["b_mag"](start, stop) + rows["r_mag"](start, stop).exp() * added(start, stop)
        )
    return found


def with_positive_threshold(rows: Mapping[str, Rows]) -> dict[str, Rows]:
    """Return rows with thresholds of at least 0; the libraries apply a ReLU besides them."""
    found = dict(rows)
    if "threshold" in rows:
        found["threshold"] = lambda start, stop: rows["threshold"](start, stop).clamp_min(0)
    return found


def row_slice(tensor: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """Return rows [start, stop) of a tensor in memory, float32."""
    return tensor[start:stop].float()
