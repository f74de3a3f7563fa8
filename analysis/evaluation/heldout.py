"""Tell whether a store leaves the held-out text of a config out, so that it may be evaluated on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.harvest.provenance import describe, differences
from conf.hookpoint import find_hookpoint

if TYPE_CHECKING:
    from activation_store import Store
    from conf.schema.run import RunConfig

SPLIT_PROVENANCE_KEYS = (
    "weights_sha256",
    "tokenizer_sha256",
    "dataset_sha256",
    "context_tokens",
    "heldout_fraction",
    "heldout",
    "dropped_special_tokens",
    "bos_id",
    "separator_id",
    "text_kind",
    "roles",
    "packing",
    "stored_positions",
    "excluded_ids",
)
"""Provenance keys that must match between store and config.

If a value differs, the store may contain rows from another model, or rows from contexts that this
config holds out.
"""


def no_heldout_reason(config: RunConfig, store: Store, hookpoint: str) -> str | None:
    """Return why this store has no held-out text under this config, or None if it has some.

    Mixed-in rows are checked as well, because they must not come from the held-out text.
    """
    provenance = store.header.provenance or {}
    if not provenance.get("weights_sha256"):
        return "the store's provenance names no language model"
    harvested = list(map(str, provenance.get("hookpoints", [])))
    if find_hookpoint(hookpoint, harvested) is None:
        return f"the store's provenance does not list {hookpoint!r} as a hookpoint"
    if config.data.heldout == "none":
        return "data.heldout=none"
    from cluster.language_model.loading import load_tokenizer

    cache_dir = Path(config.cache_dir).expanduser()
    wanted = describe(config, load_tokenizer(config.model, cache_dir, config.data.kind), cache_dir)
    found = differences(provenance, {key: wanted[key] for key in SPLIT_PROVENANCE_KEYS})
    if found:
        return f"the store was harvested with other settings ({'; '.join(found)})"
    for path in config.store.paths[1:]:
        reason = _contamination_reason(path, wanted)
        if reason is not None:
            return reason
    return None


def _contamination_reason(path: str, wanted: dict[str, Any]) -> str | None:
    """Return why the mixed-in store may contain held-out text, or None if it cannot.

    A store of another text cannot, unless it is a mixture of texts. Neither can a store of the same
    text with the same split.
    """
    from activation_store import open_store

    provenance = open_store(path).header.provenance or {}
    text = provenance.get("dataset_sha256")
    if text is None:
        return f"the provenance of the mixed-in store {path} names no text"
    keys: tuple[str, ...] = SPLIT_PROVENANCE_KEYS
    rows = "rows of the same text"
    if text != wanted["dataset_sha256"]:
        if "dataset_mixture" not in provenance and "dataset_mixture" not in wanted:
            return None
        # One of the texts of a mixture may be a text of this run.
        keys = ("heldout", "heldout_fraction")
        rows = "rows of a mixture, which may include the same text"
    found = differences(provenance, {key: wanted[key] for key in keys})
    if not found:
        return None
    return (
        f"the mixed-in store {path} has {rows}, harvested with other settings ({'; '.join(found)})"
    )
