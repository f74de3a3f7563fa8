"""Origin of an SAE: its model and text as far as they are known, for exports and pages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from analysis.errors import ExportError
from cluster.harvest.provenance import mixed_texts
from cluster.run_folder.files import HARVEST
from conf.hookpoint import parse_hookpoint
from conf.schema.model import ModelConfig
from conf.schema.run import RunConfig
from foundation.errors import ConfigError, FoundryError

UNKNOWN = "unknown"
"""Name of a model or text that the stores do not name."""


@dataclass(frozen=True)
class Source:
    """The model, text and hookpoint of an SAE, as far as the headers of its stores say.

    Holds names only, because paths on the training machine must not appear in distributed files.
    """

    model: str
    revision: str | None
    dataset: str
    hookpoint: str
    """Tensor of the language model that the SAE reconstructs, e.g. `model.layers.9`."""
    context_tokens: int | None
    """Tokens in a context. None if unknown, or if the stores differ."""
    begins_with_bos: bool | None
    """Whether contexts begin with a token that is in no document. None if unknown."""
    left_out: tuple[str, ...] | None
    """Rows that were left out of the training data, in words. None if unknown."""

    @property
    def known(self) -> bool:
        """Whether the model and the text are known."""
        return UNKNOWN not in (self.model, self.dataset)


def source_of(config: RunConfig, run_dir: Path, hookpoint: str | None) -> Source:
    """Return what is known of the rows that the run's SAE was trained on.

    Users who train on their own activations leave the config's model and text at their defaults.
    Therefore only the headers of the stores are used. If the store that this run harvested is
    missing, for example because it was deleted after training, the config is used.

    Args:
        config: The run's config.
        run_dir: The run's folder.
        hookpoint: The array that the SAE was trained on; None if it is not known.

    Raises:
        ExportError: If the hookpoint is not usable as a folder name.
    """
    found = _provenances(config, run_dir)
    if hookpoint is None:
        hookpoint = _only_array(config.store.path) or UNKNOWN
    try:
        parse_hookpoint(hookpoint, "sae.hookpoint")
    except ConfigError as error:
        raise ExportError(f"{error}; rename the array in the store") from error
    named = all("model" in one and "dataset" in one for one in found)
    revision = _agreed(found, "revision")
    context_tokens = _agreed(found, "context_tokens")
    return Source(
        model=_model(found) if named else UNKNOWN,
        revision=revision if named and isinstance(revision, str) else None,
        dataset=_dataset(found, config.store.weights) if named else UNKNOWN,
        hookpoint=hookpoint,
        context_tokens=context_tokens if isinstance(context_tokens, int) else None,
        begins_with_bos=_begins_with_bos(found),
        left_out=_left_out(found),
    )


def _provenances(config: RunConfig, run_dir: Path) -> list[dict[str, Any]]:
    """Return the provenance of every store; {} for one that is missing, damaged or has none."""
    from activation_store import open_store

    found: list[dict[str, Any]] = []
    for path in config.store.paths:
        try:
            found.append(open_store(path).header.provenance or {})
        except FoundryError:
            found.append({})
    if not found[0] and (run_dir / HARVEST).exists():
        found[0] = _configured(config)
    return found


def _only_array(store: str) -> str | None:
    """Return the name of the store's array, or None if it cannot be opened or has several."""
    from activation_store import open_store

    try:
        arrays = list(open_store(store).arrays)
    except FoundryError:
        return None
    return arrays[0] if len(arrays) == 1 else None


def _configured(config: RunConfig) -> dict[str, Any]:
    """Return the settings with which this run harvested its store, as its header named them."""
    return {
        "model": model_name(config.model),
        "revision": config.model.revision,
        "hookpoints": list(config.model.hookpoints),
        "dataset": _text_name(config.data.package, config.data.path),
        **mixed_texts(config.data),
        "context_tokens": config.data.context_tokens,
        "dropped_positions": [0],
        "dropped_special_tokens": config.data.drop_special_tokens,
        "stored_positions": [config.data.first_position, config.data.last_position],
        "excluded_ids": config.data.exclude_ids,
        "roles": config.data.roles,
        "max_norm_multiple": config.data.max_norm_multiple,
    }


def _agreed(found: Sequence[dict[str, Any]], key: str) -> Any:
    """Return the value of a key that all stores have, or None if one lacks it or they differ."""
    first = found[0].get(key)
    return first if all(one.get(key) == first for one in found) else None


def _model(found: Sequence[dict[str, Any]]) -> str:
    if len({one.get("weights_sha256") for one in found}) > 1:
        return UNKNOWN
    return shareable(str(found[0]["model"]))


def _dataset(found: Sequence[dict[str, Any]], weights: Sequence[float]) -> str:
    """Return the name of the text, or the names and weights of the texts of all stores."""
    texts = [_texts_of(one) for one in found]
    if len({one.get("dataset_sha256") for one in found}) == 1:
        return texts[0]
    parts = [f"{text} (weight {weight:g})" for text, weight in zip(texts, weights, strict=True)]
    return ", ".join(parts)


def _texts_of(provenance: dict[str, Any]) -> str:
    mixture = provenance.get("dataset_mixture")
    if not mixture:
        return shareable(str(provenance["dataset"]))
    return ", ".join(
        f"{shareable(str(one['dataset']))} (weight {float(one['weight']):g})" for one in mixture
    )


def _begins_with_bos(found: Sequence[dict[str, Any]]) -> bool | None:
    if not all("bos_id" in one for one in found):
        return None
    begins = {one["bos_id"] is not None for one in found}
    return begins.pop() if len(begins) == 1 else None


def _left_out(found: Sequence[dict[str, Any]]) -> tuple[str, ...] | None:
    """Return in words which rows every store leaves out, or None if that is unknown."""
    if not all("dropped_positions" in one for one in found):
        return None
    words = []
    positions = _agreed(found, "dropped_positions")
    if positions:
        words.append(f"position {', '.join(map(str, positions))} of each context")
    if _agreed(found, "dropped_special_tokens"):
        words.append("special tokens")
    first, last = _agreed(found, "stored_positions") or (1, None)
    if first > 1:
        words.append(f"positions before {first} of each context")
    if last is not None:
        words.append(f"positions after {last} of each context")
    if excluded := _agreed(found, "excluded_ids"):
        words.append(f"token ids {', '.join(map(str, excluded))}")
    if roles := _agreed(found, "roles"):
        words.append(f"messages with roles other than {', '.join(roles)}")
    multiple = _agreed(found, "max_norm_multiple")
    if multiple is not None:
        words.append(f"rows of more than {multiple:g} times the median norm")
    return tuple(words)


def model_name(model: ModelConfig) -> str:
    """Return the Hub name, `package/file`, or the last part of a local path."""
    if model.package:
        return "/".join(part for part in (model.package, model.path, model.gguf_file) if part)
    return shareable(model.path)


def _text_name(package: str | None, path: str) -> str:
    return "/".join((package, path)) if package else shareable(path)


def shareable(path: str) -> str:
    """Return a Hub name unchanged, but only the last part of a path on this machine."""
    local = path.startswith(("/", "~", ".")) or "\\" in path or Path(path).exists()
    return Path(path).name if local else path
