"""The registry of architectures, and functions that look one up. Does not import torch.

To add an architecture, write its settings (`settings.py`), its training class (`base.py`) and its
inference class (`sae_core/inference.py`), and name the three in an `Architecture`. The folder
`topk/` is an example; `docs/extending.md` has the steps.
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
    """A trained vector with one number per latent that inference needs in addition to `b_enc`."""

    name: str
    """Name of the parameter or buffer."""
    in_activation_units: bool
    """True if it scales with the activations, as a threshold does. It is then divided by
    `input_scale` when an SAE is read for use on raw activations."""


@dataclass(frozen=True)
class Architecture:
    """Registry entry of an architecture, which is available without importing torch.

    Every architecture has an encoder and a decoder matrix `W_enc` and `W_dec` [L, D], and biases
    `b_enc` [L] and `b_dec` [D].
    """

    settings: type[SAEConfig]
    """Class of its settings. Their values must be plain JSON values."""
    training: str
    """"module:class" of its subclass of `sae_core.architectures.base.SparseAutoencoder`."""
    inference: str
    """"module:class" of its subclass of `sae_core.inference.SAE`."""
    title: str = ""
    """Name for people, as in the title of a model card; empty: the name in the registry."""
    formula: str = ""
    """Its output as a formula of raw activations `x`, for the model card; empty: none is given."""
    metrics: tuple[TrainingMetric, ...] = ()
    """Training metrics of its own, beside those of `sae_core.training_metrics`."""
    vectors: tuple[LatentVector, ...] = ()
    """Vectors that are stored with the dictionary, in addition to `b_enc`."""


ARCHITECTURES: Registry[Architecture] = Registry(
    "architecture",
    "sae.architecture",
    "architectures",
    {"topk": "sae_core.architectures.topk.settings:TOPK"},
)


def architecture_of(settings: SAEConfig) -> Architecture:
    """Return the architecture of some settings.

    Raises:
        ConfigError: If it is not registered, or has settings of another class.
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
    """Return the settings stored in a checkpoint; without an architecture's name, those of topk.

    Raises:
        ConfigError: If the architecture is unknown.
        ValueError: If a field is unknown or has the wrong type; the message names it.
    """
    name = value.get("architecture", "topk") if isinstance(value, dict) else "topk"
    if not isinstance(name, str):
        raise ValueError(f"architecture={name!r:.80}: expected a name")
    return from_json(ARCHITECTURES[name].settings, value)


def with_architecture(settings: SAEConfig, name: str) -> SAEConfig:
    """Return settings of another architecture, with the values of all fields that both have.

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
