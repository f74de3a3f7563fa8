"""Test a model without a language-model head: no cross-entropy, and the reason is given."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForMaskedLM

from activation_store import open_store
from analysis.evaluation import stage as evaluation_stage
from analysis.export import stage as export_stage
from cluster.harvest import stage as harvest_stage
from cluster.ray_session import ray_session
from conf.schema.cluster import ClusterConfig
from conf.schema.data import DataConfig
from conf.schema.model import ModelConfig
from conf.schema.run import RunConfig
from sae_core.architectures.topk.inference import TopKInference
from sae_core.config import TopKConfig
from tests.support.tiny_models import VOCABULARY, save_tokenizer, write_text

pytestmark = pytest.mark.ray
D, HOOKPOINT = 16, "encoder.layer.1"


def test_an_encoder_is_harvested_and_evaluated_without_cross_entropy(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": D, "num_attention_heads": 2, "intermediate_size": 32}
    bert = BertConfig(vocab_size=len(VOCABULARY), num_hidden_layers=2, **sizes)
    BertForMaskedLM(bert).save_pretrained(tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    config = RunConfig(
        cache_dir=str(tmp_path / "cache"),
        model=ModelConfig(
            path=str(tmp_path / "model"), kind="base", hookpoints=[HOOKPOINT], dtype="float32"
        ),
        data=DataConfig(
            path=str(write_text(tmp_path / "text.txt")),
            tokens=500,
            context_tokens=16,
            heldout_fraction=0.2,
        ),
    )
    config.store.shard_tokens, config.store.dtype = 64, "float32"
    config.eval.tokens, config.eval.batch_contexts = 200, 5
    stores = []
    with ray_session(ClusterConfig(), min_cpus=2):
        for workers in (1, 2):
            config.store.path = str(tmp_path / f"store-{workers}")
            config = replace(config, cluster=ClusterConfig(harvest_workers=workers))
            harvest_stage.run(config, tmp_path / "run")
            stores.append(open_store(config.store.path))
    first, second = (store.read(HOOKPOINT, 0, store.n_tokens) for store in stores)
    np.testing.assert_array_equal(first, second)

    W = torch.cat([torch.eye(D), -torch.eye(D)])
    sae_config = TopKConfig(n_latents=2 * D, k=4, hookpoint=HOOKPOINT)
    TopKInference(sae_config, W, W.clone(), torch.zeros(2 * D), torch.zeros(D), step=7).save(
        tmp_path / "run"
    )
    evaluation_stage.run(config, tmp_path / "run")
    metrics = json.loads((tmp_path / "run" / "eval" / "metrics.json").read_text())
    assert metrics["heldout"] and "model.kind=base" in metrics["reason"]
    assert 0 < metrics["fvu"] < 1 and 0 < metrics["l0"] <= 4 and metrics["rows"] > 0
    assert all(metrics[name] is None for name in metrics if name.startswith("ce_"))
    assert metrics["kl"] is None
    export_stage.run(config, tmp_path / "run")
    card = (tmp_path / "run" / "export" / "README.md").read_text()
    assert "Not measured: no cross-entropy" in card and "`ce_" not in card
