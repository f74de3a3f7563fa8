"""Test which settings may change when a run is resumed."""

from __future__ import annotations

from cluster.run_folder.saved_config import forbidden_changes
from conf.schema.run import RunConfig


def test_how_a_step_is_run_may_change():
    saved, new = RunConfig(), RunConfig()
    new.train.cuda_graph, new.train.kernels, new.train.prefilter = "off", "stock", "none"
    assert forbidden_changes(saved, new) == {}


def test_what_a_step_computes_may_not_change():
    saved, new = RunConfig(), RunConfig()
    new.train.batch_tokens, new.seed = 4096, 1
    assert set(forbidden_changes(saved, new)) == {"train.batch_tokens", "seed"}
