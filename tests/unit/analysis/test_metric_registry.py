"""Test that a metric from outside the package is measured and shown like a built-in one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from activation_store import StoreWriter
from analysis.evaluation import stage as evaluation_stage
from analysis.evaluation.measurement import Accumulator, Measured, Rows
from analysis.evaluation.metrics import METRICS, Metric, definitions, metric_rows
from analysis.export import stage as export_stage
from analysis.pages import stage as report_stage
from analysis.status import stage as status_stage
from conf.schema.run import RunConfig
from sae_core import SAE
from sae_core.architectures.topk.inference import TopKInference
from sae_core.config import TopKConfig

D, HOOKPOINT = 16, "acts"
DEFINITION = "mean over rows of the cosine of the angle between x and recon"


class CosineSum(Accumulator):
    def __init__(self, sae: SAE) -> None:
        super().__init__(sae)
        self.total, self.n_rows = 0.0, 0

    def add_rows(self, rows: Rows) -> None:
        self.total += float(torch.cosine_similarity(rows.x, rows.recon).double().sum())
        self.n_rows += len(rows.x)


def cosine(**changes: Any) -> Metric:
    fields: dict[str, Any] = {
        "title": "Cosine",
        "definition": DEFINITION,
        "value": lambda measured: measured[CosineSum].total / measured[CosineSum].n_rows,
        "accumulator": CosineSum,
        "unit": "of 1",
        "format": ".5f",
        "better": "higher",
        "headline": True,
    }
    return Metric(**fields | changes)


@pytest.fixture
def run(tmp_path: Path) -> tuple[RunConfig, Path, float]:
    """Make a run with an SAE and a store; return its config, folder and mean cosine."""
    rows = np.random.default_rng(0).normal(size=(100, D)).astype(np.float32)
    writer = StoreWriter(tmp_path / "store", {HOOKPOINT: D}, dtype="float32", shard_tokens=64)
    writer.write_item(0, {HOOKPOINT: rows[:64]})
    writer.write_item(1, {HOOKPOINT: rows[64:]})
    writer.finalise()
    W = torch.cat([torch.eye(D), -torch.eye(D)])
    sae_config = TopKConfig(n_latents=2 * D, k=5, hookpoint=HOOKPOINT)
    sae = TopKInference(sae_config, W, W.clone(), torch.zeros(2 * D), torch.zeros(D), step=7)
    sae.save(tmp_path)
    x = torch.from_numpy(rows)
    config = RunConfig(name="run")
    config.store.path = str(tmp_path / "store")
    return config, tmp_path, float(torch.cosine_similarity(x, sae(x)).double().mean())


def evaluated(config: RunConfig, run_dir: Path) -> dict[str, Any]:
    evaluation_stage.run(config, run_dir)
    return dict(json.loads((run_dir / "eval" / "metrics.json").read_text()))


def test_a_metric_from_outside_appears_everywhere(
    run: tuple[RunConfig, Path, float], capsys: pytest.CaptureFixture[str]
) -> None:
    config, run_dir, expected = run
    plain = evaluated(config, run_dir)
    with METRICS.registered("cosine", cosine()):
        # The files are those of the same weights and rows, but lack this metric.
        metrics = evaluated(config, run_dir)
        assert metrics["cosine"] == pytest.approx(expected, rel=1e-6) and 0 < expected < 1
        assert metrics["definitions"]["cosine"] == DEFINITION
        shown = f"{expected:.5f}"
        console = capsys.readouterr().out
        assert any("cosine" in line and shown in line for line in console.splitlines())

        report_stage.run(config, run_dir)
        page = (run_dir / "report" / "index.html").read_text(encoding="utf-8")
        assert f'<code>cosine</code></td><td class="num">{shown} of 1</td>' in page
        assert f'<span class="soft small">Cosine</span><b>{shown}</b>' in page  # a tile

        export_stage.run(config, run_dir)
        card = (run_dir / "export" / "README.md").read_text(encoding="utf-8")
        assert f"| `cosine` | {shown} of 1 | {DEFINITION} | higher |" in card

        status_stage.run(config, run_dir)
        assert f"cosine {shown} of 1" in " ".join(capsys.readouterr().out.split())
    differing = {"cosine", "definitions", "seconds"}
    assert {key: value for key, value in metrics.items() if key not in differing} == {
        key: value for key, value in plain.items() if key not in differing
    }


def test_metrics_of_one_accumulator_share_its_sums(run: tuple[RunConfig, Path, float]) -> None:
    config, run_dir, _ = run
    made = []

    class Counted(CosineSum):
        def __init__(self, sae: SAE) -> None:
            super().__init__(sae)
            made.append(self)

    def n_rows(measured: Measured) -> int:
        return measured[Counted].n_rows

    count = cosine(accumulator=Counted, value=n_rows)
    with METRICS.registered("one", count), METRICS.registered("two", count):
        metrics = evaluated(config, run_dir)
    assert metrics["one"] == metrics["two"] == 100 and len(made) == 1


def test_a_value_that_is_not_finite_is_null(run: tuple[RunConfig, Path, float]) -> None:
    config, run_dir, _ = run
    with METRICS.registered("cosine", cosine(value=lambda measured: float("nan"))):
        assert evaluated(config, run_dir)["cosine"] is None
        assert metric_rows(evaluated(config, run_dir))[-1].text == "–"


def test_a_metric_that_is_not_registered_here_is_still_shown() -> None:
    rows = metric_rows({"fvu": 0.25, "cosine": 0.5, "definitions": {"cosine": DEFINITION}})
    assert [row.name for row in rows] == [*METRICS.names(), "cosine"]
    assert rows[0][:3] == ("fvu", "0.25", "") and rows[0].better == "lower"
    assert rows[-1][:4] == ("cosine", "0.5", "", DEFINITION)


def test_the_builtin_metrics_and_their_order() -> None:
    names = ["fvu", "fvu_median", "variance_top_1", "mse", "l0"]
    names += ["dead_fraction", "frequency_tokens", "dead_in_training"]
    names += ["ce_clean", "ce_recon", "ce_zero", "ce_mean"]
    assert list(definitions()) == [*names, "ce_recovered_mean", "ce_recovered", "kl", "tokens"]
    assert METRICS["dead_fraction"].text(0.0123) == "1.23% of all latents"
    assert METRICS["tokens"].text(1234) == "1,234 tokens"
