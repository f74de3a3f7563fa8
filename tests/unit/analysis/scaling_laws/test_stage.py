"""Test the fit stage on made-up runs: which runs count, and what it writes."""

from __future__ import annotations

import csv
import json
import math
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from analysis.errors import FitError
from analysis.pages.png import to_png
from analysis.scaling_laws import stage
from analysis.scaling_laws.cells import best_of_each, read_sweep
from analysis.scaling_laws.laws import JOINT_LAW
from analysis.scaling_laws.study import study_sweep
from cluster.run_folder.saved_config import load_config, save_config
from conf.schema.run import RunConfig
from tests.support.sweep_runs import D_MODEL, GPT4, STEPS, write_rows, write_run

SIZES, KS = (1024, 4096, 16384, 65536), (16, 64, 256)
EVIL = "<script>alert('x')<>&"


def level(n: int, k: int) -> float:
    return float(np.exp(JOINT_LAW.log_loss(GPT4, np.array([[n, k]], np.float64)))[0])


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write runs for 4 n and 3 k from published coefficients; they converge in n^0.6 tokens."""
    folder = tmp_path_factory.mktemp("runs") / "sweep"
    rng = np.random.default_rng(0)
    for n in SIZES:
        for k in KS:
            noisy = level(n, k) * float(np.exp(0.001 * rng.standard_normal()))
            settles = 4_000 * (n / 1024) ** 0.6
            write_run(
                folder / f"n{n}-k{k}", n, k, noisy, rng, settles_tokens=settles, heldout=noisy * 1.1
            )
    return folder


def fitted(runs: Path | str, **options: Any) -> dict[str, Any]:
    config = RunConfig(stage="fit")
    config.fit.runs, config.fit.bootstrap = str(runs), 100
    for name, value in options.items():
        setattr(config.fit, name, value)
    stage.run(config, Path("unused"))
    folder = Path(str(runs).split("*", maxsplit=1)[0])
    folder = folder if folder.is_dir() else folder.parent
    found: dict[str, Any] = json.loads((folder / "fit" / "fit.json").read_text())
    return found


def law(found: dict[str, Any], name: str, k: int | None = None) -> dict[str, Any]:
    (only,) = [row for row in found["laws"] if row["law"] == name and row["k"] == k]
    return dict(only)


@pytest.fixture(scope="module")
def found(sweep: Path) -> dict[str, Any]:
    return fitted(sweep)


def test_every_law_is_fitted(found: dict[str, Any]) -> None:
    titles = {(row["law"], row["k"]) for row in found["laws"]}
    wanted = {("L(n, k)", None), *((name, k) for name in ("L(n)", "L(C)", "T(n)") for k in KS)}
    assert titles == wanted
    assert not found["not_fitted"] and not found["left_out"]
    exponent = law(found, "T(n)", 64)["coefficients"]["p"]
    assert exponent["low"] < 0.6 < exponent["high"]
    assert exponent["value"] == pytest.approx(0.6, abs=0.15)


def test_the_largest_cells_are_forecast(found: dict[str, Any]) -> None:
    held_out = law(found, "L(n, k)")["held_out"]
    assert [row["name"] for row in held_out] == [f"n65536-k{k}" for k in KS]
    for row in held_out:
        assert row["forecast"]["low"] < row["measured"] < row["forecast"]["high"]
        assert abs(row["error"]) < 0.03
        assert row["error"] == pytest.approx(row["forecast"]["value"] / row["measured"] - 1)
    # Three cells remain at each k, too few for the three coefficients of L(n).
    assert "3 usable cells, expected at least 4" in law(found, "L(n)", 16)["not_held_out"]


def test_forecasts_do_not_see_the_cells_they_are_checked_on(tmp_path: Path, sweep: Path) -> None:
    copy = tmp_path / "sweep"
    shutil.copytree(sweep, copy, ignore=shutil.ignore_patterns("fit"))
    for k in KS:
        steps = np.arange(2, STEPS + 1, 2)
        write_rows(copy / f"n65536-k{k}", steps, np.full(len(steps), 0.9))
    before, after = (law(fitted(runs), "L(n, k)")["held_out"] for runs in (sweep, copy))
    assert [row["forecast"] for row in before] == [row["forecast"] for row in after]
    assert all(row["error"] < -0.2 for row in after)


def test_tables(sweep: Path, found: dict[str, Any]) -> None:
    with (sweep / "fit" / "cells.csv").open() as file:
        cells = {row["name"]: row for row in csv.DictReader(file)}
    assert len(cells) == 12
    row = cells["n4096-k64"]
    assert int(row["flops_per_token"]) == 2 * 4096 * D_MODEL + 8 * 64 * D_MODEL
    assert float(row["flops"]) == int(row["flops_per_token"]) * int(row["tokens"])
    assert float(row["fvu"]) == pytest.approx(level(4096, 64), rel=0.02)
    with (sweep / "fit" / "points.csv").open() as file:
        points = [row for row in csv.DictReader(file) if row["law"] == "L(n, k)"]
    assert len(points) == 12
    for row in points:
        residual = math.log(float(row["measured"]) / float(row["fitted"]))
        assert float(row["log_residual"]) == pytest.approx(residual, abs=1e-9)


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [v or "" for k, v in attrs if k in ("src", "href") or k.startswith("on")]


def test_page_and_figures(sweep: Path, found: dict[str, Any]) -> None:
    text = (sweep / "fit" / "index.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.addresses == [] and "script" not in page.tags
    assert not re.search(r"https?://|url\(|@import", text)
    assert "nan" not in text.lower()
    assert page.tags.count("svg") >= 2 * len(found["laws"])
    assert text.count('class="ring') == 3  # the joint law's held-out cells
    assert f"{law(found, 'L(n, k)')['coefficients']['gamma']['value']:.4g}" in text
    figures = sorted((sweep / "fit").glob("*.svg"))
    assert len(figures) == 2 * len(found["laws"])
    for figure in figures:
        ElementTree.parse(figure)  # a standalone file must be valid XML
        png = figure.with_suffix(".png").read_bytes()
        assert png.startswith(b"\x89PNG")
        unlettered = re.sub(r"<text.*?</text>", "", figure.read_text(encoding="utf-8"))
        assert png != to_png(unlettered), "the font was not found"


def test_hostile_names_are_escaped(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for n in (64, 128, 256, 512, 1024):
        write_run(tmp_path / f"{EVIL}{n}", n, 8, level(n, 8), rng)
    write_run(tmp_path / f"{EVIL}half", 64, 8, 0.5, rng, steps_done=10)
    fitted(tmp_path, hold_out="largest")
    text = (tmp_path / "fit" / "index.html").read_text(encoding="utf-8")
    assert "<script" not in text
    assert text.count("&lt;script&gt;") >= 8
    for figure in (tmp_path / "fit").glob("*.svg"):
        ElementTree.parse(figure)


def test_unusable_runs_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    for n in (64, 128, 256, 512, 1024):
        write_run(tmp_path / f"n{n}", n, 8, level(n, 8), rng)
    write_run(tmp_path / "half", 2048, 8, 0.4, rng, steps_done=STEPS // 2)
    steps = np.arange(2, STEPS + 1, 2)
    for name, values in {
        "nan": np.where(steps < 300, 0.5, np.nan),
        "risen": np.where(steps < 300, 0.3, 0.6),
        "nothing": np.full(len(steps), 1.5),
    }.items():
        write_rows(write_run(tmp_path / name, 2048, 8, 0.4, rng), steps, values)
    (write_run(tmp_path / "torn", 2048, 8, 0.4, rng) / "config.yaml").write_text("sae: [")
    (write_run(tmp_path / "foreign", 2048, 8, 0.4, rng) / "config.yaml").write_text("colour: 1")
    write_run(tmp_path / "unlogged", 2048, 8, 0.4, rng).joinpath("metrics.jsonl").unlink()
    worse = write_run(tmp_path / "worse", 512, 8, level(512, 8) * 1.2, rng, lr=0.1)
    found = fitted(tmp_path)
    reasons = {
        "half": "unfinished: step 200 of 400",
        "nan": "its last fvu is not finite",
        "risen": "diverged: fvu ended at 0.6",
        "nothing": "diverged: fvu ended at 1.5",
        "torn": "unreadable: ",
        "foreign": "unreadable: ",
        "unlogged": "contains 0 SAEs",
        worse.name: "n512 has the same n, k and seed",
    }
    assert found["left_out"].keys() == reasons.keys()
    printed = capsys.readouterr().out
    for name, reason in reasons.items():
        assert reason in found["left_out"][name], name
        assert name == "worse" or f"left out {name}: " in printed
    assert law(found, "L(n)", 8)["points"] == 5


def test_too_few_cells(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(FitError, match="expected a folder of runs"):
        fitted(tmp_path)
    for n in (64, 128, 256):
        write_run(tmp_path / f"n{n}", n, 8, level(n, 8), rng, identity="", settles_tokens=1.0)
    with pytest.raises(FitError, match=r"L\(n\) at k = 8: 3 usable cells, expected at least 4"):
        fitted(tmp_path)
    shutil.rmtree(tmp_path / "n256" / "checkpoints")
    with pytest.raises(FitError, match="n256 has no readable checkpoint, so its d_model and"):
        fitted(tmp_path)


def test_cells_that_ended_in_their_warm_up_have_no_frontier(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for n in (64, 128, 256, 512):
        run = write_run(tmp_path / f"n{n}", n, 8, level(n, 8), rng)
        config = load_config(run / "config.yaml")
        config.optim.warmup_tokens = config.train.n_steps * config.train.batch_tokens + 1
        save_config(config, run / "config.yaml")
    reason = fitted(tmp_path)["not_fitted"]["L(C) at k = 8"]
    assert "no cell has logged rows after its warm-up and the first tenth of its tokens" in reason


def test_cells_of_different_activations_are_refused(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for i, n in enumerate((64, 128, 256, 512)):
        write_run(tmp_path / f"n{n}", n, 8, level(n, 8), rng, identity=f"acts-{i // 2}")
    with pytest.raises(FitError, match=r"n64 on acts-1|n128 on acts-0|trained on the same"):
        fitted(tmp_path)


def test_pattern_seeds_and_the_heldout_metric(sweep: Path, tmp_path: Path) -> None:
    copy = tmp_path / "sweep"
    shutil.copytree(sweep, copy, ignore=shutil.ignore_patterns("fit"))
    rng = np.random.default_rng(5)
    write_run(copy / "seed1-k64", 4096, 64, level(4096, 64), rng, seed=1)
    found = fitted(f"{copy}/*-k64")
    assert {row["k"] for row in found["laws"]} == {64}
    assert law(found, "L(n)", 64)["points"] == 5  # a second seed is a separate cell
    heldout = fitted(f"{copy}/*-k64", metric="heldout_fvu")
    assert "run stage=evaluate" in heldout["left_out"]["seed1-k64"]
    cells, _ = best_of_each(read_sweep(str(copy), "heldout_fvu").cells, "heldout_fvu")
    for cell in cells:
        assert cell.level("heldout_fvu") == pytest.approx(1.1 * cell.level("fvu"), rel=0.02)


def test_learning_rate_decay_does_not_count_as_convergence(tmp_path: Path) -> None:
    """The loss falls again during the learning-rate decay, which T(n) must leave out."""
    rng = np.random.default_rng(0)
    steps = np.arange(2, STEPS + 1, 2)
    run = write_run(tmp_path / "n64", 64, 8, 0.5, rng, decay_tokens=100_000)
    values = 0.5 * (1 + 4 * np.exp(-steps / 20)) * np.where(steps > 300, 0.8, 1.0)
    write_rows(run, steps, values)
    (cell,) = read_sweep(str(tmp_path), "fvu").cells
    assert cell.level("fvu") == pytest.approx(0.4, rel=1e-3)
    assert cell.steady("fvu").x[-1] == 300_000
    assert cell.steady("fvu").smooth().y[-1] == pytest.approx(0.5, rel=1e-3)


def test_same_seed_same_intervals(sweep: Path) -> None:
    cells = read_sweep(f"{sweep}/*-k16", "fvu")
    again = [study_sweep(cells, "fvu", "none", 100, seed) for seed in (0, 0, 1)]
    first, same, other = (s.results[0].fit.coefficients() for s in again)
    assert first == same != other
