"""Test the report page: missing parts are named, names are escaped, nothing is fetched."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from analysis.number_format import number
from analysis.pages import stage as report_stage
from analysis.pages.svg import histogram, line_chart, thin
from cluster.run_folder.errors import RunFileError
from cluster.run_folder.metrics_log import read_training_log
from conf.schema.run import RunConfig
from conf.schema.submit import SubmitConfig

EVIL = "<script>alert('x')</script>\"&"


class Page(HTMLParser):
    """Tags and addresses of a page, as an HTML parser sees them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [v or "" for k, v in attrs if k in ("src", "href") or k.startswith("on")]


def row(step: int, **values: Any) -> str:
    known = {"step": step, "tokens": step * 100, "sae": "a", "loss": 1 / step, "fvu": 1 / step}
    return json.dumps({**known, "l0": 8.0, "tokens_per_s": 500.0, "mfu": None, **values}) + "\n"


def full_run(run_dir: Path, name: str = "a") -> Path:
    (run_dir / "eval").mkdir(parents=True)
    (run_dir / "metrics.jsonl").write_text("".join(row(s, sae=name) for s in range(1, 40)))
    metrics = {"fvu": 0.1834, "ce_clean": 2.8, "ce_recon": 3.1, "kl": None, "hookpoint": name}
    (run_dir / "eval" / "metrics.json").write_text(
        json.dumps(metrics | {"definitions": {"fvu": name}})
    )
    counts = {"tokens": 1000, "counts": [0, 0, 1, 10, 100, 1000]}
    (run_dir / "eval" / "frequency.json").write_text(json.dumps(counts))
    group = {"first": 2, "last": 3, "rows": 1234, "median": 7.125, "largest": 99.5}
    norms = {"by_position": [group], "by_token": [{**group, "last": 2, "token": name}]}
    (run_dir / "harvest.json").write_text(
        json.dumps({"tokens_per_s": 3607.0, "store_bytes": 2**20, "norms": {name: norms}})
    )
    (run_dir / "env.json").write_text(json.dumps({"hardware": {"cpu": name}}))
    checkpoint = run_dir / "checkpoints" / "step-00000039"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").write_text("{}")
    return run_dir


def rendered(run_dir: Path, config: RunConfig | None = None) -> str:
    report_stage.run(config or RunConfig(name="run"), run_dir)
    return (run_dir / "report" / "index.html").read_text(encoding="utf-8")


def test_full_page(tmp_path: Path) -> None:
    text = rendered(full_run(tmp_path))
    page = Page(text)
    assert page.tags.count("svg") >= 5  # loss, fvu, l0, throughput, histogram
    for shown in (
        "0.1834",
        "2.800 → 3.100",
        "3,607",
        "1 MiB",
        "2 never fired (0 of 1,000 tokens)",
        "step-00000039",
        '<td>position 2 to 3</td><td class="num">1,234</td><td class="num">7.12</td>',
        "token &#39;a&#39;",
    ):
        assert shown in text, shown
    assert "run <code>stage" not in text


def test_empty_run_says_what_is_missing(tmp_path: Path) -> None:
    text = rendered(tmp_path)
    for missing in (
        "No training metrics yet",
        "Not evaluated yet",
        "No firing frequencies yet",
        "No harvest summary",
        "No checkpoints yet",
        "env.json not found",
    ):
        assert missing in text, missing
    assert "<h2>Norms</h2>" not in text


def test_names_are_escaped_everywhere(tmp_path: Path) -> None:
    config = RunConfig(name=EVIL)
    config.model.hookpoints, config.data.path = [EVIL], EVIL
    text = rendered(full_run(tmp_path, EVIL), config)
    page = Page(text)
    assert "script" not in page.tags
    assert "<script" not in text
    assert (
        text.count("&lt;script&gt;") >= 8
    )  # title, heading, summary, legend, tips, tables, config


def test_nothing_is_fetched(tmp_path: Path) -> None:
    text = rendered(full_run(tmp_path))
    assert Page(text).addresses == []
    assert "default-src 'none'" in text
    shown = f"</i> {SubmitConfig().address}</div>"  # a setting, shown as plain text
    assert not re.search(r"https?://|url\(|@import", text.replace(shown, ""))


def test_resumed_and_torn_log(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        row(1) + row(2, loss=9.0) + row(2, loss=0.5) + row(1, sae="b") + '{"step": 3, "l'
    )
    log = read_training_log(tmp_path)
    assert [r["loss"] for r in log.rows["a"]] == [1.0, 0.5]
    assert list(log.rows) == ["a", "b"]
    assert log.unreadable_lines == 1
    text = rendered(tmp_path)
    assert "1 line(s) of metrics.jsonl could not be read" in text
    assert 'class="legend' in text


def test_values_that_cannot_be_drawn(tmp_path: Path) -> None:
    rows = [row(1, loss=None, fvu=float("nan")), row(2, loss=-1.0, fvu=0.0), row(3, l0="many")]
    (tmp_path / "metrics.jsonl").write_text("".join(rows))
    text = rendered(tmp_path)
    assert "nan" not in text.lower().replace("finance", "")
    assert "Not in this run" in text  # the curves whose keys the rows lack


def test_stored_rows_are_not_called_held_out(tmp_path: Path) -> None:
    run_dir = full_run(tmp_path)
    metrics = {"fvu": 0.2, "heldout": False, "reason": "own arrays", "ce_clean": None}
    (run_dir / "eval" / "metrics.json").write_text(json.dumps(metrics))
    text = rendered(run_dir)
    assert "stored rows" in text
    assert "own arrays" in text
    assert "held-out text" not in text


def test_damaged_file_is_named(tmp_path: Path) -> None:
    full_run(tmp_path)
    (tmp_path / "env.json").write_text("[1]")
    with pytest.raises(RunFileError, match=r"env\.json: expected a JSON object"):
        rendered(tmp_path)


def test_line_breaks_at_gaps() -> None:
    svg = line_chart(
        {"a": [(0, 1.0), (1, 2.0), (2, float("nan")), (3, 1.0), (4, 3.0)]}, label="l", x_label="x"
    )
    assert svg.count("<polyline") == 2
    assert line_chart({"a": [(0, float("nan"))]}, label="l", x_label="x") == ""
    assert line_chart({}, label="l", x_label="x") == ""


def test_single_point_and_constant_line_are_drawn() -> None:
    assert "<circle" in line_chart({"a": [(5, 0.0)]}, label="l", x_label="x")
    flat = line_chart({"a": [(0, 32.0), (1, 32.0)]}, label="l", x_label="x")
    heights = {point.split(",")[1] for point in re.findall(r"[\d.]+,[\d.]+", flat)}
    assert len(heights) == 1


@pytest.mark.parametrize("values", [(1e-9, 1e9), (0.2, 0.21), (3.0, 7000.0), (1.0, 1.0)])
@pytest.mark.parametrize("log", [False, True])
def test_axis_labels_differ(values: tuple[float, float], log: bool) -> None:
    svg = line_chart({"a": [(0, values[0]), (1, values[1])]}, label="l", x_label="x", log=log)
    labels = re.findall(r'text-anchor="end">([^<]+)<', svg)[:-1]
    assert len(labels) >= 2
    assert len(set(labels)) == len(labels), labels


def test_labels_of_a_narrow_range_differ() -> None:
    svg = line_chart({"a": [(1_000_000, 1.0), (1_001_000, 2.0)]}, label="l", x_label="x")
    labels = re.findall(r'text-anchor="middle">([^<]+)<', svg)
    assert len(set(labels)) == len(labels) >= 4, labels


def test_thinning_keeps_spikes() -> None:
    points = [(float(i), 0.0) for i in range(100_000)]
    points[31_337] = (31_337.0, 9.0)
    kept = thin(points, 600)
    assert len(kept) <= 601
    assert (31_337.0, 9.0) in kept
    assert kept == sorted(kept)


def test_histogram_counts_every_latent(tmp_path: Path) -> None:
    text = rendered(full_run(tmp_path))
    tips = re.findall(r"<title>(-?[\d.]+) to (-?[\d.]+): (\d+)</title>", text)
    assert sum(int(count) for _, _, count in tips) == 4  # 2 of the 6 never fired
    assert histogram([0, 1], [0], label="l", x_label="x") == ""


@pytest.mark.parametrize(
    ("value", "expected"),
    [(0, "0"), (12_000, "12k"), (3.5e6, "3.5M"), (0.02, "0.02"), (1e-6, "1e-6")],
)
def test_number(value: float, expected: str) -> None:
    assert number(value) == expected
