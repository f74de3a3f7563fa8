"""Provenance: describe where rows come from, and check that a store matches the run's settings."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from activation_store.errors import StoreMismatchError
from conf.hookpoint import find_hookpoint

if TYPE_CHECKING:
    from activation_store import Store
    from conf.schema.data import DataConfig, MixedText
    from conf.schema.run import RunConfig

NAMES = ("model", "revision", "dataset", "dataset_mixture")
"""Provenance keys that may differ between runs that share a store, unlike the hashes."""
EARLIER: dict[str, Any] = {
    "model_shards": 1,
    "model_kind": "causal_lm",
    "heldout": "documents",
    "text_kind": "text",
    "roles": [],
    "packing": "joined",
    "stored_positions": [1, None],
    "excluded_ids": [],
}
"""Values of keys that the headers of earlier stores lack."""


def describe(config: RunConfig, tokenizer: Any, cache_dir: Path) -> dict[str, Any]:
    """Return the provenance of a config's rows: every setting that affects their bytes."""
    from cluster.language_model.files import locate_model
    from cluster.language_model.loading import tokenizer_sha256
    from cluster.language_model.texts import find_text
    from cluster.language_model.tokens.boundaries import boundary_ids, excluded_ids

    model = locate_model(config.model)
    bos_id, separator_id = boundary_ids(tokenizer, config.data)
    return {
        "model": model.name,
        "revision": model.revision,
        "weights_sha256": model.weights_sha256(cache_dir),
        "model_kind": config.model.kind,
        "model_dtype": config.model.dtype,
        "hookpoints": list(config.model.hookpoints),
        "tokenizer_sha256": tokenizer_sha256(tokenizer),
        "bos_id": bos_id,
        "separator_id": separator_id,
        "dataset": _dataset(config.data),
        **mixed_texts(config.data),
        "dataset_sha256": find_text(config.data).sha256(cache_dir),
        "text_kind": config.data.kind,
        "roles": sorted(config.data.roles),
        "packing": config.data.packing,
        "context_tokens": config.data.context_tokens,
        "batch_contexts": config.model.batch_contexts,
        "model_shards": config.model.shards,  # another split rounds its partial sums differently
        "heldout_fraction": config.data.heldout_fraction,
        "heldout": config.data.heldout,
        "dropped_positions": [0],
        "dropped_special_tokens": config.data.drop_special_tokens,
        "stored_positions": [config.data.first_position, config.data.last_position],
        "excluded_ids": list(excluded_ids(tokenizer, config.data)),
        "max_norm_multiple": config.data.max_norm_multiple,
        "tokens_wanted": config.data.tokens,
        "seed": config.seed,
    }


def _dataset(data: DataConfig | MixedText) -> str:
    return "/".join(part for part in (data.package, data.path) if part)


def mixed_texts(data: DataConfig) -> dict[str, Any]:
    """Return names and weights of the texts of a mixture under one key, or {} without one."""
    if not data.mixture:
        return {}
    parts: list[DataConfig | MixedText] = [data, *data.mixture]
    texts = [{"dataset": _dataset(one), "weight": one.weight} for one in parts]
    return {"dataset_mixture": texts}


def matching_store(path: str, config: RunConfig, provenance: dict[str, Any]) -> Store | None:
    """Open the store at `path`. Return None if no store exists there yet.

    Raises:
        StoreMismatchError: If the store was harvested with other settings. The error lists the
            differences.
    """
    from activation_store import open_store, store_exists

    if Path(path).is_file():
        raise StoreMismatchError(
            f"store.path={path!r} is a file; expected a folder; set store.path to a new folder"
        )
    holds_files = Path(path).is_dir() and any(Path(path).iterdir())
    if not holds_files and not store_exists(path):
        return None
    store = open_store(path)
    there = {
        **(store.header.provenance or {}),
        "store.dtype": store.header.dtype,
        "store.shard_tokens": store.header.shard_tokens,
    }
    wanted = {
        **provenance,
        "store.dtype": config.store.dtype,
        "store.shard_tokens": config.store.shard_tokens,
    }
    found = differences(there, wanted)
    if found:
        raise StoreMismatchError(
            f"store.path={path!r} holds rows harvested with other settings, in the arrays "
            f"{dict(store.arrays)}:\n"
            + "\n".join(f"  {line}" for line in found)
            + "\nset store.path to a new folder, or train on this one with stage=train"
        )
    return store


def differences(there: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """Return one line per setting that differs between a store and a run, ignoring `NAMES`."""
    lines = []
    for key, value in wanted.items():
        found = there.get(key, EARLIER.get(key))
        if key not in NAMES and not _equal(key, found, value):
            lines.append(f"{key}: the store has {found!r}, this run has {value!r}")
    return lines


def _equal(key: str, there: object, wanted: object) -> bool:
    """Compare two values of a setting; hookpoints are equal if they name the same tensors."""
    if key == "hookpoints" and isinstance(there, list) and isinstance(wanted, list):
        return len(there) == len(wanted) and all(
            find_hookpoint(ours, [theirs]) for ours, theirs in zip(wanted, there, strict=True)
        )
    return there == wanted
