"""Names of the model and the text that an exported SAE was trained on."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from analysis.errors import ExportError

if TYPE_CHECKING:
    from cluster.config import DataConfig, ModelConfig
    from conf.schema import RunConfig
    from sae_core.stored import StoredSAE


@dataclass(frozen=True)
class Source:
    """The model, text and hookpoint of an SAE.

    Holds names only: paths of the training machine must not appear in files that are distributed.
    """

    model: str
    revision: str | None
    dataset: str
    hookpoint: str
    """Module of the language model whose output the SAE reconstructs, e.g. `model.layers.9`."""
    context_tokens: int


def source_of(config: RunConfig, sae: StoredSAE) -> Source:
    """Return the names of what the SAE was trained on, from the run's config.

    Raises:
        ExportError: If the hookpoint is not usable as a folder name.
    """
    hookpoint = sae.config.hookpoint or next(iter(config.model.hookpoints), "")
    if not re.fullmatch(r"\w[\w.\-]*", hookpoint):
        raise ExportError(
            f"sae.hookpoint={hookpoint!r}: expected letters, digits, dots, dashes and underscores; "
            "rename the array in the store"
        )
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
