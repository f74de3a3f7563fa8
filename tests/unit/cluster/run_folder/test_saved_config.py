"""Test which settings may change when a run is resumed."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.run_folder.saved_config import forbidden_changes, load_config
from conf.schema.run import RunConfig
from foundation.errors import ConfigError


def test_how_a_step_is_run_may_change():
    saved, new = RunConfig(), RunConfig()
    new.train.cuda_graph, new.train.kernels, new.train.prefilter = "off", "stock", "none"
    assert forbidden_changes(saved, new) == {}


def test_what_a_step_computes_may_not_change():
    saved, new = RunConfig(), RunConfig()
    new.train.batch_tokens, new.seed = 4096, 1
    assert set(forbidden_changes(saved, new)) == {"train.batch_tokens", "seed"}


@pytest.mark.parametrize("text", ["", "null", "{}", "[1, 2]"])
def test_a_config_without_settings_is_refused(tmp_path: Path, text: str) -> None:
    """It would be read as that of a run with the default of every setting."""
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(
        ConfigError, match=r"config\.yaml=.*: expected plain values under known keys"
    ):
        load_config(tmp_path / "config.yaml")
