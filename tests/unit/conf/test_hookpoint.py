"""Test that two strings for the same tensor are treated as the same hookpoint."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cluster.harvest.provenance import differences
from conf.checks import validate
from conf.hookpoint import find_hookpoint
from conf.schema.data import DataConfig
from conf.schema.model import ModelConfig
from conf.schema.run import RunConfig
from foundation.errors import ConfigError
from sae_core.config import TopKConfig


def test_find_hookpoint() -> None:
    names = ["model.layers.9", "model.layers.9@input", "a b"]
    assert find_hookpoint("model.layers.9@output", names) == "model.layers.9"
    assert find_hookpoint("model.layers.9", ["x", "model.layers.9@output"]) == names[0] + "@output"
    assert find_hookpoint("model.layers.9@input", names) == names[1]
    assert find_hookpoint("m@k[a=1,b=2]", ["m@k[b=2,a=1]"]) == "m@k[b=2,a=1]"
    assert find_hookpoint("model.layers.8", names) is None
    # Arrays of a user's own store need not be named like hookpoints.
    assert find_hookpoint("a b", names) == "a b" and find_hookpoint("c d", names) is None


@pytest.mark.parametrize("hookpoint", ["model.layers.9", "model.layers.9@output"])
def test_the_hookpoint_of_the_sae_may_be_written_in_full(hookpoint: str) -> None:
    config = RunConfig(
        stage="harvest",
        model=ModelConfig(path="m", hookpoints=["model.layers.9@output"]),
        data=DataConfig(path="text"),
        sae=TopKConfig(hookpoint=hookpoint),
    )
    validate(config, ("harvest",))
    with pytest.raises(ConfigError, match=r"sae.hookpoint='model.layers.8': expected one of"):
        validate(replace(config, sae=TopKConfig(hookpoint="model.layers.8")), ("harvest",))


def test_one_of_several_hookpoints_must_be_chosen() -> None:
    config = RunConfig(
        stage="pipeline",
        model=ModelConfig(path="m", hookpoints=["model.layers.8", "model.layers.9"]),
        data=DataConfig(path="t"),
    )
    with pytest.raises(ConfigError, match=r"sae\.hookpoint=None: expected one of .*layers\.9"):
        validate(config, ("pipeline", "harvest"))
    validate(replace(config, sae=TopKConfig(hookpoint="model.layers.9")), ("pipeline",))
    validate(replace(config, stage="harvest"), ("harvest",))  # trains no SAE


def test_a_store_of_the_same_hookpoints_was_harvested_with_the_same_settings() -> None:
    short, full = ["a", "b@input"], ["a@output", "b@input"]
    assert differences({"hookpoints": short}, {"hookpoints": full}) == []
    assert differences({"hookpoints": full}, {"hookpoints": short}) == []
    for other in (["a"], ["b@input", "a"], ["a", "b"], None):
        assert len(differences({"hookpoints": other}, {"hookpoints": full})) == 1
