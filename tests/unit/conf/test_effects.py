"""Test that settings without effect in a run are reported."""

from __future__ import annotations

from typing import Any

import pytest

from activation_store.config import MixedStore
from conf.effects import RULES, _flat, without_effect
from conf.schema.run import RunConfig
from sae_core.config import TopKConfig

CASES: dict[str, dict[str, Any]] = {
    "sae.auxk": {"sae.auxk_coef": 0.0, "sae.auxk": 64},
    "sae.auxk_rows": {"sae.auxk_coef": 0.0, "sae.auxk_rows": 0.5},
    "sae.dead_after_tokens": {"sae.dead_after_tokens": 10**7, "train.tokens": 10**6},
    "optim.lr_at_16k": {"optim.lr": 1e-3, "optim.lr_at_16k": 1e-3},
    "checkpoint.keep_every_tokens": {"checkpoint.keep_every_tokens": 10**9},
    "cluster.max_lead_items": {"cluster.max_lead_items": 64},
    "store.weight": {"store.weight": 2.0},
    "parallel.zero_stage": {"parallel.zero_stage": 1},
    "logging.wandb_project": {"logging.wandb": "disabled", "logging.wandb_project": "x"},
    "model.revision": {"model.package": "p", "model.revision": "r"},
    "store.dtype": {"stage": "train", "store.dtype": "float32"},
    "store.codec": {"stage": "train", "store.codec": "blosc"},
    "store.shard_tokens": {"stage": "train", "store.shard_tokens": 4096},
    "store.chunk_bytes": {"stage": "train", "store.chunk_bytes": 4096},
    "sweep.k": {"stage": "train", "sweep.k": [16, 32]},
    "fit.runs": {"stage": "train", "fit.runs": "runs"},
    "reshard.shards": {"stage": "train", "reshard.shards": 8},
    "submit.nodes": {"stage": "train", "submit.nodes": 2},
    "plan.n_gpus": {"stage": "train", "plan.n_gpus": 8},
}


def config_with(values: dict[str, Any]) -> RunConfig:
    config = RunConfig()
    for key, value in values.items():
        group, _, name = key.rpartition(".")
        setattr(getattr(config, group) if group else config, name, value)
    return config


@pytest.mark.parametrize("key", CASES)
def test_a_setting_without_effect_is_told(key: str) -> None:
    (line,) = without_effect(config_with(CASES[key]), CASES[key])
    assert line.startswith(f"{key}=") and " has no effect: " in line


def test_every_rule_is_tested() -> None:
    for rule in RULES:
        assert any(key == name or key.startswith(f"{name}.") for name in rule.keys for key in CASES)
        for name in rule.keys:  # a typo would make a rule silent
            assert any(key == name or key.startswith(f"{name}.") for key in _flat(RunConfig()))


def test_settings_with_an_effect_are_not_told() -> None:
    assert not list(without_effect(RunConfig(), []))
    assert not list(without_effect(config_with({"sae.auxk": 64, "optim.lr_at_16k": 1e-3}), []))
    mixed = config_with({"store.weight": 2.0, "store.mixture": [MixedStore("s")]})
    assert not list(without_effect(mixed, []))
    # Values of an experiment for other stages are not reported; a job may use every group.
    assert not list(without_effect(config_with({"stage": "train", "submit.nodes": 2}), []))
    submitted = {"stage": "submit", "sweep.k": [16], "plan.n_gpus": 8}
    assert not list(without_effect(config_with(submitted), submitted))


def test_latents_can_die_within_a_short_run() -> None:
    """With the former default, 10,000,000, AuxK never ran in a run of 1,000,000 tokens."""
    sae = TopKConfig()
    assert sae.resolved(576, 2048, 1_000_000).dead_after_tokens == 100_000
    assert sae.resolved(4096, 131072, 10**10).dead_after_tokens == 10_000_000
    assert TopKConfig(dead_after_tokens=5).resolved(576, 2048, 100).dead_after_tokens == 5
