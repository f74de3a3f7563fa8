"""Test what the plan says of a tiny run, and of one that has been trained before."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.planning.stage import run
from cluster.run_folder.errors import RunDirError
from cluster.run_folder.files import CHECKPOINTS, CONFIG
from cluster.run_folder.saved_config import save_config
from conf.schema.run import RunConfig


def tiny(tmp_path: Path) -> RunConfig:
    config = RunConfig(name="tiny", stage="plan", runs_dir=str(tmp_path))
    config.model.hookpoints, config.model.d_model = ["h"], 16
    config.sae.n_latents, config.plan.hardware = 64, "h100"
    config.data.tokens, config.plan.disk_tib = 10_000, 1
    config.train.batch_tokens, config.train.tokens = 1000, 1_000_000
    config.optim.lr, config.optim.decay_tokens = 1e-3, 100_000
    return config


def test_tiny_sizes_have_a_fitting_unit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tiny(tmp_path), tmp_path / "tiny")
    out = capsys.readouterr().out
    assert "0.00" not in out.partition("one step")[0] and "0.000 GiB" not in out
    # 10,000 rows of 16 numbers of two bytes, and 16 bytes of sidecars for each row.
    assert "KiB at once" in out and "KiB per rank" in out


def test_the_plan_of_a_trained_run_announces_the_learning_rate(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny(tmp_path)
    (tmp_path / "tiny" / CHECKPOINTS / "step-00000990").mkdir(parents=True)
    save_config(config, tmp_path / "tiny" / CONFIG)
    run(config, tmp_path / "tiny")
    assert "learning rate after" not in capsys.readouterr().out
    config.train.tokens = 2_000_000
    run(config, tmp_path / "tiny")
    text = " ".join(capsys.readouterr().out.split())
    assert "after 990,000 tokens becomes 0.001 instead of 0.0001" in text
    config.train.tokens = 980_000
    with pytest.raises(RunDirError, match=r"train\.tokens=980000: expected at least 990000"):
        run(config, tmp_path / "tiny")
