"""Paths in a job's arguments reach Hydra unchanged."""

from __future__ import annotations

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from cluster.jobs.command import _word, job_command
from cluster.jobs.slurm.backend import Slurm
from conf.schema.run import RunConfig


@pytest.mark.parametrize(
    "path",
    ["/data/runs", "s3://bucket/a%20b", "/my code/runs", "/data/a,b (new)", "/a=b/{c}", '/a"b'],
)
def test_hydra_reads_the_path_back(path: str) -> None:
    (override,) = OverridesParser.create().parse_overrides([f"runs_dir={_word(path)}"])
    assert override.value() == path


def test_a_job_gets_no_settings_of_its_submission() -> None:
    typed = ["submit=slurm", "submit.stage=train", "submit.gpus=4", "seed=1", "stage=submit"]
    config = RunConfig()
    config.submit.stage = "train"
    words = job_command(config, Slurm(), typed)
    assert "seed=1" in words and "stage=train" in words
    assert not any(word.startswith("submit") for word in words)
    # Unless another setting refers to one.
    words = job_command(config, Slurm(), [*typed, "parallel.latent=${submit.gpus}"])
    assert "submit.gpus=4" in words
