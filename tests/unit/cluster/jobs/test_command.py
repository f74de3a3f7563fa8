"""Paths in a job's arguments reach Hydra unchanged."""

from __future__ import annotations

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from cluster.jobs.command import _word


@pytest.mark.parametrize(
    "path",
    ["/data/runs", "s3://bucket/a%20b", "/my code/runs", "/data/a,b (new)", "/a=b/{c}", '/a"b'],
)
def test_hydra_reads_the_path_back(path: str) -> None:
    (override,) = OverridesParser.create().parse_overrides([f"runs_dir={_word(path)}"])
    assert override.value() == path
