"""Test metrics.jsonl and wandb, whose failures must never stop training."""

from __future__ import annotations

import json

import pytest

from cluster.run_folder.metrics_log import logged_rows
from cluster.training import metric_sinks
from cluster.training.metric_sinks import MetricSinks
from conf.schema.run import RunConfig

ROW = {"sae": "s", "step": 1, "fvu": float("nan"), "loss": 0.5}


def config(wandb: str) -> RunConfig:
    made = RunConfig()
    made.logging.wandb = wandb
    return made


def rows(folder):
    return list(logged_rows(folder))


def test_rows_are_appended_over_restarts_and_nan_is_null(tmp_path):
    for _ in range(2):
        sinks = MetricSinks(config("disabled"), tmp_path, console=False)
        sinks.write(ROW)
        sinks.close()
    assert rows(tmp_path) == [ROW | {"fvu": None}] * 2
    assert not (tmp_path / "wandb_id").exists()


def test_a_torn_line_does_not_swallow_the_next_row(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "los')
    sinks = MetricSinks(config("disabled"), tmp_path, console=False)
    sinks.write(ROW)
    sinks.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert lines[0] == '{"step": 1, "los' and json.loads(lines[1])["step"] == 1


def test_wandb_continues_under_its_id(tmp_path):
    ids = []
    for _ in range(2):
        sinks = MetricSinks(config("offline"), tmp_path, console=False)
        sinks.write(ROW)
        ids.append(sinks._wandb.id)
        assert 0 < sinks._wandb.settings.finish_timeout <= 60, (
            "0 would wait forever for a dead network"
        )
        sinks.close()
    assert ids[0] == ids[1] == (tmp_path / "wandb_id").read_text()


@pytest.mark.slow
def test_a_dead_network_stops_nothing(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(metric_sinks, "_WANDB_TIMEOUT_S", 3.0)  # the test waits for all of it
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    sinks = MetricSinks(config("online"), tmp_path, console=False)
    sinks.write(ROW)
    sinks.close()
    assert len(rows(tmp_path)) == 1
    assert "wandb is off" in capfd.readouterr().err


def test_a_broken_wandb_is_dropped(tmp_path, capfd):
    class Broken:
        def log(self, values):
            raise RuntimeError("gone")

    sinks = MetricSinks(config("disabled"), tmp_path, console=False)
    sinks._wandb = Broken()
    sinks.write(ROW)
    sinks.write(ROW)
    sinks.close()
    assert len(rows(tmp_path)) == 2
    assert capfd.readouterr().err.count("wandb is off") == 1
