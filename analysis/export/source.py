"""What an export says about the model and the text that its SAE was trained on."""

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
    """Names only: paths of the machine that trained have no place in a file that is handed on."""

    model: str
    revision: str | None
    dataset: str
    hookpoint: str
    """Module of the language model whose output the SAE reconstructs: `model.layers.9`."""
    context_tokens: int


def source_of(config: RunConfig, sae: StoredSAE) -> Source:
    """Names of what the SAE was trained on, from the run's config.

    Raises:
        ExportError: the hookpoint cannot be a folder's name.
    """
    hookpoint = sae.config.hookpoint or next(iter(config.model.hookpoints), "")
    if not re.fullmatch(r"\w[\w.\-]*", hookpoint):
        raise ExportError(
            f"sae.hookpoint={hookpoint!r}: expected letters, digits, dots, dashes and underscores; "
            "rename the store's array"
        )
    return Source(
        model=model_name(config.model),
        revision=config.model.revision,
        dataset=dataset_name(config.data),
        hookpoint=hookpoint,
        context_tokens=config.data.context_tokens,
    )


def model_name(model: ModelConfig) -> str:
    """Hub name, `package/file`, or the last part of a local folder."""
    if model.package:
        return "/".join(part for part in (model.package, model.path, model.gguf_file) if part)
    return shareable(model.path)


def dataset_name(data: DataConfig) -> str:
    """`package/file`, or the last part of a local path."""
    if data.package:
        return "/".join(part for part in (data.package, data.path) if part)
    return shareable(data.path)


def shareable(path: str) -> str:
    """A hub name as it stands; of anything that is a path here, the last part."""
    local = path.startswith(("/", "~", ".")) or "\\" in path or Path(path).exists()
    return Path(path).name if local else path
