"""Names of the model and the text that an exported SAE was trained on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from analysis.errors import ExportError
from conf.hookpoint import parse_hookpoint
from conf.schema.data import DataConfig
from conf.schema.model import ModelConfig
from conf.schema.run import RunConfig
from foundation.errors import ConfigError, FoundryError

if TYPE_CHECKING:
    from sae_core.checkpoint.stored_sae import StoredSAE


@dataclass(frozen=True)
class Source:
    """The model, text and hookpoint of an SAE.

    Holds names only, because paths on the training machine must not appear in distributed files.
    """

    model: str
    revision: str | None
    dataset: str
    hookpoint: str
    """Tensor of the language model that the SAE reconstructs, e.g. `model.layers.9`."""
    context_tokens: int


def source_of(config: RunConfig, sae: StoredSAE) -> Source:
    """Return the model, text and hookpoint that the SAE was trained on, from the run's config.

    Raises:
        ExportError: If the hookpoint is not usable as a folder name.
    """
    hookpoint = sae.config.hookpoint or next(iter(config.model.hookpoints), "")
    try:
        parse_hookpoint(hookpoint, "sae.hookpoint")
    except ConfigError as error:
        raise ExportError(f"{error}; rename the array in the store") from error
    return Source(
        model=model_name(config.model),
        revision=config.model.revision,
        dataset=dataset_name(config.data),
        hookpoint=hookpoint,
        context_tokens=config.data.context_tokens,
    )


def model_name(model: ModelConfig) -> str:
    """Return the Hub name, `package/file`, or the last part of a local path."""
    if model.package:
        return "/".join(part for part in (model.package, model.path, model.gguf_file) if part)
    return shareable(model.path)


def dataset_name(data: DataConfig) -> str:
    """Return `package/file`, the Hub name, or the last part of a local path."""
    if data.package:
        return "/".join(part for part in (data.package, data.path) if part)
    return shareable(data.path)


def shareable(path: str) -> str:
    """Return a Hub name unchanged, but only the last part of a path on this machine."""
    local = path.startswith(("/", "~", ".")) or "\\" in path or Path(path).exists()
    return Path(path).name if local else path


def with_stored_provenance(config: RunConfig) -> RunConfig:
    """Return the config with the model and text replaced by those that the store's rows came from.

    Users who train on their own activations leave the config's model at its default. Exports and
    reports must not name that model. The model and the text therefore become "unknown" unless the
    provenance of every store names both. With a mixture, `data.path` lists the texts of all stores.
    """
    from activation_store import open_store

    try:
        found = [open_store(path).header.provenance or {} for path in config.store.paths]
    except FoundryError:
        if not config.store.mixture:
            return config  # the store was moved after training: nothing to compare with
        found = [{}]  # a store of a mixture is missing or damaged: name no model and no text
    unknown = "unknown"
    if not all("model" in one and "dataset" in one for one in found):
        return replace(config, model=ModelConfig(path=unknown), data=DataConfig(path=unknown))
    if len({one.get("weights_sha256") for one in found}) > 1:
        config = replace(config, model=ModelConfig(path=unknown))
    if len({one.get("dataset_sha256") for one in found}) > 1:
        weights = config.store.weights
        texts = [
            f"{shareable(str(one['dataset']))} (weight {weight:g})"
            for one, weight in zip(found, weights, strict=True)
        ]
        config = replace(config, data=replace(config.data, package=None, path=", ".join(texts)))
    return config
