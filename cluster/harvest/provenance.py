"""Provenance: describe where rows come from, and check that a store matches the run's settings."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from activation_store.errors import StoreMismatchError

if TYPE_CHECKING:
    from activation_store import Store
    from conf.schema.run import RunConfig

NAMES = ("model", "revision", "dataset")
"""Provenance keys that may differ between runs that share a store, unlike the hashes."""


def describe(config: RunConfig, tokenizer: Any, cache_dir: Path) -> dict[str, Any]:
    """Return the provenance of a config's rows: every setting that affects their bytes."""
    from cluster.language_model.contexts import boundary_ids
    from cluster.language_model.files import locate_model
    from cluster.language_model.loading import tokenizer_sha256
    from cluster.language_model.texts import find_text

    model = locate_model(config.model)
    bos_id, separator_id = boundary_ids(tokenizer)
    return {
        "model": model.name,
        "revision": model.revision,
        "weights_sha256": model.weights_sha256(cache_dir),
        "model_dtype": config.model.dtype,
        "hookpoints": list(config.model.hookpoints),
        "tokenizer_sha256": tokenizer_sha256(tokenizer),
        "bos_id": bos_id,
        "separator_id": separator_id,
        "dataset": "/".join(part for part in (config.data.package, config.data.path) if part),
        "dataset_sha256": find_text(config.data).sha256(cache_dir),
        "context_tokens": config.data.context_tokens,
        "batch_contexts": config.model.batch_contexts,
        "model_shards": config.model.shards,  # another split rounds its partial sums differently
        "heldout_fraction": config.data.heldout_fraction,
        "dropped_positions": [0],
        "dropped_special_tokens": config.data.drop_special_tokens,
        "tokens_wanted": config.data.tokens,
        "seed": config.seed,
    }


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
        "model_shards": 1,  # the value for stores that were written before this key existed
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
        if key not in NAMES and there.get(key) != value:
            lines.append(f"{key}: the store has {there.get(key)!r}, this run has {value!r}")
    return lines
