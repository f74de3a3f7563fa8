"""The registry of architectures, and functions that look one up. Does not import torch.

To add an architecture, write its settings (`settings.py`), its training class (`base.py`) and its
inference class (`sae_core/inference.py`), and name all three in an `Architecture`. The folder
`topk/` is an example; `docs/extending.md` lists the steps.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from foundation.errors import ConfigError
from foundation.registry import Registry, import_attribute
from foundation.typed_json import from_json
from sae_core.architectures.settings import SAEConfig
from sae_core.training_metrics import TrainingMetric

if TYPE_CHECKING:
    from sae_core.architectures.base import SparseAutoencoder
    from sae_core.distributed.mesh import Mesh
    from sae_core.kernels.interface import Kernels


@dataclass(frozen=True)
class LatentVector:
    """A trained vector, other than `b_enc`, with one number per latent that inference needs."""

    name: str
    """Name of the parameter or buffer."""
    in_activation_units: bool
    """True if the vector scales with the activations, like a threshold. Such a vector is divided by
    `input_scale` when an SAE is loaded for use on raw activations."""


@dataclass(frozen=True)
class Architecture:
    """Registry entry of an architecture, which is available without importing torch.

    Every architecture has encoder and decoder matrices `W_enc` and `W_dec` [L, D], and biases
    `b_enc` [L] and `b_dec` [D].
    """

    settings: type[SAEConfig]
    """Class of its settings. Their values must be plain JSON values."""
    training: str
    """"module:class" of its subclass of `sae_core.architectures.base.SparseAutoencoder`."""
    inference: str
    """"module:class" of its subclass of `sae_core.inference.SAE`."""
    title: str = ""
    """Human-readable name, for example for the title of a model card. If empty, the registry name
    is used."""
    formula: str = ""
    """Formula of its output in terms of raw activations `x`, for the model card. If empty, the card
    gives no formula."""
    metrics: tuple[TrainingMetric, ...] = ()
    """Its own training metrics, in addition to those of `sae_core.training_metrics`."""
    vectors: tuple[LatentVector, ...] = ()
    """Vectors that are stored with the dictionary, in addition to `b_enc`."""


ARCHITECTURES: Registry[Architecture] = Registry(
    "architecture",
    "sae.architecture",
    "architectures",
    {
        "topk": "sae_core.architectures.topk.settings:TOPK",
        "jumprelu": "sae_core.architectures.jumprelu.settings:JUMPRELU",
        "relu": "sae_core.architectures.relu.settings:RELU",
        "gated": "sae_core.architectures.gated.settings:GATED",
    },
)


def architecture_of(settings: SAEConfig) -> Architecture:
    """Return the registered architecture of an SAE with these settings.

    Raises:
        ConfigError: If the architecture is not registered, or its settings have another class.
    """
    architecture = ARCHITECTURES[settings.architecture]
    if type(settings) is not architecture.settings:
        raise ConfigError(
            "sae.architecture",
            settings.architecture,
            f"the architecture of these settings, {type(settings).__name__}",
            f"choose the architecture with its settings: sae={settings.architecture}",
        )
    return architecture


def check_settings(settings: SAEConfig) -> None:
    """Validate the architecture's name and all fields.

    Raises:
        ConfigError: If the architecture is unknown, or a value is out of range.
    """
    architecture_of(settings)
    settings.validate()


def settings_from_json(value: Any) -> SAEConfig:
    """Return the settings stored in a checkpoint; if no architecture is named, it is topk.

    Raises:
        ConfigError: If the architecture is unknown.
        ValueError: If a field is unknown or has the wrong type; the message names it.
    """
    name = value.get("architecture", "topk") if isinstance(value, dict) else "topk"
    if not isinstance(name, str):
        raise ValueError(f"architecture={name!r:.80}: expected a name")
    return from_json(ARCHITECTURES[name].settings, value)


def with_architecture(settings: SAEConfig, name: str) -> SAEConfig:
    """Convert settings to another architecture, keeping the values of all fields that both have.

    Raises:
        ConfigError: If the architecture is unknown.
    """
    if name == settings.architecture:
        return settings
    other = ARCHITECTURES[name].settings
    shared = {part.name for part in fields(other)} - {"architecture"}
    values = {key: value for key, value in vars(settings).items() if key in shared}
    return other(architecture=name, **values)


def build_sae(
    settings: SAEConfig, d_model: int, mesh: Mesh, kernels: Kernels, seed: int
) -> SparseAutoencoder:
    """Build this rank's shard of a newly initialised SAE.

    Args:
        settings: Architecture, sizes and coefficients.
        d_model: Width D of the activations.
        mesh: This rank's position; dictionary rows are split over its latent group.
        kernels: Implementation of the sparse operations.
        seed: Seed of the initial dictionary, which does not depend on the number of shards.

    Raises:
        ConfigError: If the architecture is unknown.
    """
    training = import_attribute(architecture_of(settings).training)
    sae: SparseAutoencoder = training(settings, d_model, mesh, kernels, seed)
    return sae
