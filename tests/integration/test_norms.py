"""Test that rows of huge norm are neither stored, trained on nor evaluated, and are reported."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from activation_store import open_store
from analysis.evaluation import stage as evaluation_stage
from cluster.harvest import stage as harvest_stage
from cluster.ray_session import ray_session
from conf.schema.cluster import ClusterConfig
from conf.schema.data import DataConfig
from conf.schema.model import ModelConfig
from conf.schema.run import RunConfig
from sae_core.architectures.topk.inference import TopKInference
from sae_core.config import TopKConfig
from tests.support.tiny_models import save_llama, write_text

pytestmark = pytest.mark.ray
D, HOOKPOINT, LOUD = 16, "model.layers.0", 7


def harvest(config: RunConfig, name: str, **changes: Any) -> Any:
    config = replace(config, **changes)
    config.store = replace(config.store, path=str(Path(config.runs_dir) / name))
    harvest_stage.run(config, Path(config.runs_dir) / f"run-{name}")
    return open_store(config.store.path)


def test_rows_of_huge_norm_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One token of 60 has an embedding 300 times as long as the others."""
    model = save_llama(tmp_path / "model")
    model.get_input_embeddings().weight.data[LOUD] *= 300
    model.save_pretrained(tmp_path / "model")
    config = RunConfig(
        runs_dir=str(tmp_path),
        cache_dir=str(tmp_path / "cache"),
        model=ModelConfig(path=str(tmp_path / "model"), hookpoints=[HOOKPOINT], dtype="float32"),
        data=DataConfig(
            path=str(write_text(tmp_path / "text.txt")),
            tokens=700,
            context_tokens=16,
            heldout_fraction=0.2,
        ),
    )
    config.store.shard_tokens, config.store.dtype = 64, "float32"
    config.eval.tokens = 400
    with ray_session(ClusterConfig(), min_cpus=2):
        whole = harvest(config, "all", data=replace(config.data, max_norm_multiple=None))
        one, two = (
            harvest(config, f"of-{n}", cluster=ClusterConfig(harvest_workers=n)) for n in (1, 2)
        )
    out = " ".join(capsys.readouterr().out.split())
    loud = whole.read("token_id", 0, whole.n_tokens) == LOUD
    rows = whole.read(HOOKPOINT, 0, whole.n_tokens)
    assert 0 < loud.sum() < 40
    assert f"{loud.sum()} of {whole.n_tokens:,} rows have more than 10 times the median norm" in out
    assert f"most often the tokens 'w4' ({loud.sum()})" in out  # token 7
    stored = one.read(HOOKPOINT, 0, one.n_tokens)
    np.testing.assert_array_equal(stored, rows[~loud])
    np.testing.assert_array_equal(stored, two.read(HOOKPOINT, 0, two.n_tokens))
    assert (one.read("token_id", 0, one.n_tokens) != LOUD).all()
    summary = json.loads((tmp_path / "run-of-1" / "harvest.json").read_text())
    assert summary["dropped_by_norm"] == loud.sum() and summary["tokens"] == one.n_tokens
    assert summary["norms"] == one.header.provenance["norms"]
    first = summary["norms"][HOOKPOINT]["by_position"][0]
    assert (first["first"], first["last"]) == (0, 0) and 0 < first["median"] <= first["largest"]
    (limit,) = one.header.provenance["max_norms"].values()
    assert np.linalg.norm(stored, axis=1).max() < limit < np.linalg.norm(rows, axis=1).max()

    # The SAE reconstructs the large token perfectly, and everything else badly.
    loudest = torch.from_numpy(rows[loud][0])
    W = torch.nn.functional.normalize(loudest[None], dim=1)
    sae_config = TopKConfig(n_latents=1, k=1, hookpoint=HOOKPOINT)
    sae = TopKInference(sae_config, W, W.clone(), torch.zeros(1), torch.zeros(D), step=7)
    metrics = {}
    for name, multiple in (("all", None), ("of-1", 10.0)):
        run = replace(config, data=replace(config.data, max_norm_multiple=multiple))
        run.store = replace(config.store, path=str(tmp_path / name))
        sae.save(tmp_path / f"eval-{name}")
        evaluation_stage.run(run, tmp_path / f"eval-{name}")
        file = tmp_path / f"eval-{name}" / "eval" / "metrics.json"
        metrics[name] = json.loads(file.read_text())
    out = " ".join(capsys.readouterr().out.split())
    assert metrics["all"]["fvu"] < 0.1 and metrics["of-1"]["fvu"] > 0.5
    assert metrics["all"]["fvu_median"] > 0.5 and metrics["of-1"]["fvu_median"] > 0.5
    assert metrics["all"]["variance_top_1"] > 0.3 > metrics["of-1"]["variance_top_1"]
    assert metrics["of-1"]["rows"] < metrics["all"]["rows"]
    assert out.count("so fvu mostly measures how well these are reconstructed") == 1
