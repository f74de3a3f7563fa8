"""Test that a hookpoint kind from outside is harvested, stored, evaluated and exported."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from activation_store import open_store, verify_store
from analysis.evaluation import stage as evaluation_stage
from analysis.export import stage as export_stage
from cluster.harvest import stage as harvest_stage
from cluster.harvest.items import plan_items
from cluster.language_model.hookpoint_kinds import HOOKPOINT_KINDS
from cluster.language_model.loading import load_language_model, load_tokenizer
from cluster.language_model.tokens.contexts import prepare_contexts
from conf.schema.data import DataConfig
from conf.schema.model import ModelConfig
from conf.schema.run import RunConfig
from foundation.errors import ConfigError
from sae_core import load_sae
from sae_core.architectures.topk.inference import TopKInference
from sae_core.config import TopKConfig
from tests.support.tiny_models import harvest_here, save_gpt2, write_text
from tests.support.toys.hookpoint_kind import TakenKind

D, MODULE = 12, "transformer.h.1"
HOOKPOINT = f"{MODULE}@taken"


@pytest.fixture
def config(tmp_path: Path) -> Iterator[RunConfig]:
    save_gpt2(tmp_path / "model")
    config = RunConfig(
        cache_dir=str(tmp_path / "cache"),
        model=ModelConfig(
            path=str(tmp_path / "model"), hookpoints=[MODULE, HOOKPOINT], dtype="float32"
        ),
        data=DataConfig(
            path=str(write_text(tmp_path / "text.txt")),
            tokens=200,
            context_tokens=16,
            heldout_fraction=0.2,
        ),
    )
    config.store.path, config.store.shard_tokens = str(tmp_path / "store"), 64
    config.store.dtype, config.eval.tokens = "float32", 64
    with HOOKPOINT_KINDS.registered("taken", TakenKind()):
        yield config


def test_a_kind_from_outside_works_in_every_stage(config: RunConfig, tmp_path: Path) -> None:
    harvest_here(config, tmp_path / "run")  # a Ray worker would not know the toy kind
    store = open_store(config.store.path)
    assert store.arrays == {MODULE: D, HOOKPOINT: D} and verify_store(config.store.path) == []
    rows = {name: store.read(name, 0, store.n_tokens) for name in store.arrays}

    # Compare all rows with those that a hand-made hook sees, in the same batches.
    model = load_language_model(config.model, tmp_path / "cache")
    cache = tmp_path / "cache"
    contexts = prepare_contexts(config.data, load_tokenizer(config.model, cache), cache)
    plan = plan_items(contexts.train, config.seed, config.data.tokens, 64)
    seen: list[torch.Tensor] = []
    handle = model.get_submodule(MODULE).register_forward_pre_hook(
        lambda _m, inputs: seen.append(inputs[0])
    )
    for item in range(plan.n_items):
        model(torch.from_numpy(contexts.train.input_ids(plan.contexts(item))))
    handle.remove()
    expected = torch.cat(seen)[:, 1:].numpy()[contexts.train.kept(plan.order)]
    assert sorted(map(tuple, rows[HOOKPOINT])) == sorted(map(tuple, expected))
    assert not np.array_equal(rows[MODULE], rows[HOOKPOINT])

    save_sae(tmp_path / "run")
    evaluation_stage.run(config, tmp_path / "run")
    metrics = json.loads((tmp_path / "run" / "eval" / "metrics.json").read_text())
    assert metrics["heldout"] and metrics["hookpoint"] == HOOKPOINT
    assert metrics["ce_recon"] == pytest.approx(metrics["ce_clean"], abs=1e-6)
    order = np.random.default_rng([config.seed, 2]).permutation(len(contexts.heldout))
    heldout = torch.from_numpy(contexts.heldout.input_ids(order[: config.eval.tokens // 16]))
    kept = ~torch.isin(heldout, torch.tensor([0, 1]))[..., None]
    model.get_submodule(MODULE).register_forward_pre_hook(
        lambda _m, inputs: (torch.where(kept, 0.0, inputs[0]), *inputs[1:])
    )
    zeroed = model(heldout).logits[:, 1:-1].log_softmax(-1)
    ce_zero = -zeroed.gather(-1, heldout[:, 2:, None]).double().mean()
    assert metrics["ce_zero"] == pytest.approx(float(ce_zero), rel=1e-5)
    assert metrics["ce_zero"] > metrics["ce_clean"] + 1e-3

    export_stage.run(config, tmp_path / "run")
    export = tmp_path / "run" / "export"
    card = (export / "README.md").read_text()
    assert f"| hookpoint | taken of `{MODULE}`, width {D} |" in card
    peer = load_sae(export / "sparsify" / HOOKPOINT)
    assert peer.config.hookpoint == HOOKPOINT


def test_a_kind_that_is_not_installed_is_refused_before_any_work(
    config: RunConfig, tmp_path: Path
) -> None:
    config.model.hookpoints = [f"{MODULE}@inptu"]
    with pytest.raises(ConfigError, match=r"'transformer.h.1@inptu'.*kinds after '@': output, inp"):
        harvest_stage.prepare(config, tmp_path / "run")
    assert not (tmp_path / "cache").exists()


def save_sae(folder: Path) -> None:
    """Save an SAE with the rows e_i and -e_i, which reconstructs every activation exactly."""
    W = torch.cat([torch.eye(D), -torch.eye(D)])
    zeros = torch.zeros(2 * D), torch.zeros(D)
    config = TopKConfig(n_latents=2 * D, k=D, hookpoint=HOOKPOINT)
    TopKInference(config, W, W.clone(), *zeros).save(folder)
