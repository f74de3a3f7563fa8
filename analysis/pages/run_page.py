"""Report stage: render one offline HTML page for a run from the files written so far."""

from __future__ import annotations

import math
import statistics
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from analysis.evaluation.metrics import METRICS, Metric, MetricRow, metric_rows
from analysis.number_format import number, value_text
from analysis.origin import source_of
from analysis.pages.settings import flat, tree
from analysis.pages.svg import histogram, line_chart
from cluster.run_folder.contents import checkpoint_entries, read_optional_json
from cluster.run_folder.files import ENVIRONMENT, EVALUATION, FREQUENCY, HARVEST
from cluster.run_folder.metrics_log import TrainingLog, read_training_log
from foundation.units import bytes_text

if TYPE_CHECKING:
    from analysis.origin import Source
    from conf.schema.run import RunConfig

TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class Curve:
    """One chart of the training log."""

    title: str
    key: str
    """Key of the value in a row of the log."""
    note: str
    """Caption below the title."""
    log: bool = False
    """Draw a logarithmic y axis."""
    scale: float = 1.0
    """Factor from the logged value to the drawn one; 100 for per cent."""


CURVES = (
    Curve("Loss", "loss", "FVU of the batch plus the weighted auxiliary loss", log=True),
    Curve("FVU", "fvu", "fraction of variance unexplained, training batches", log=True),
    Curve("L0", "l0", "active latents per token"),
    Curve("Dead latents", "dead_fraction", "% not fired for sae.dead_after_tokens", scale=100),
    Curve("Throughput", "tokens_per_s", "training tokens per second"),
    Curve("Loader wait", "loader_wait_fraction", "% of time spent waiting for data", scale=100),
    Curve("Gradient norm", "grad_norm", "before clipping", log=True),
    Curve("Learning rate", "lr", ""),
)


def render(config: RunConfig, run_dir: Path) -> str:
    """Render the page as HTML. The template escapes all names and values."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined
    )
    source = source_of(config, run_dir, config.sae.hookpoint)
    log = read_training_log(run_dir)
    metrics = read_optional_json(run_dir / EVALUATION)
    harvest = read_optional_json(run_dir / HARVEST)
    return environment.get_template("run.html.j2").render(
        name=config.name,
        created=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        summary=_summary(config, source),
        tiles=_tiles(metrics, log, harvest),
        charts=_charts(log),
        saes=list(log.rows),
        unreadable_lines=log.unreadable_lines,
        metrics=_metric_rows(metrics),
        frequency=_frequency(read_optional_json(run_dir / FREQUENCY)),
        harvest=flat(_without(harvest, "norms")) if harvest else None,
        norms=_norms(harvest),
        throughput=_throughput(log),
        config=tree(_settings_that_count(config, source)),
        environment=flat(_without(read_optional_json(run_dir / ENVIRONMENT), "starts")),
        checkpoints=checkpoint_entries(run_dir),
        bytes=bytes_text,
    )


def _without(values: dict[str, Any] | None, left_out: str) -> dict[str, Any]:
    return {key: value for key, value in (values or {}).items() if key != left_out}


def _summary(config: RunConfig, source: Source) -> str:
    sae = config.sae
    shape = f"{sae.architecture} SAE, {sae.n_latents:,} latents"
    active = sae.active_latents()
    if active is not None:
        shape += f", k = {active}"
    if not source.known:
        return f"{shape}, on {source.hookpoint}; the store does not name its model and text"
    return f"{shape}, on {source.hookpoint} of {source.model}; {source.dataset}"


def _settings_that_count(config: RunConfig, source: Source) -> dict[str, Any]:
    """Return the config, without the model and text of a run whose rows came from elsewhere."""
    values = asdict(config)
    if not source.known:
        del values["model"], values["data"]
    return values


def _tiles(
    metrics: dict[str, Any] | None, log: TrainingLog, harvest: dict[str, Any] | None
) -> list[tuple[str, str, str]]:
    """Return (title, value, note) for each tile; the value is a dash if its stage has not run."""
    metrics = metrics or {}
    steps = [rows[-1] for rows in log.rows.values() if rows]
    trained = max((row.get("tokens") or 0 for row in steps), default=0)
    rate = _median_rate(log)
    harvested = (harvest or {}).get("tokens_per_s")
    where = "held-out text" if metrics.get("heldout", True) else "stored rows"
    headlines = [
        (
            metric.title,
            _shown(metric, metrics.get(name)),
            ", ".join(filter(None, (metric.unit or where, metric.basis(metrics)))),
        )
        for name, metric in METRICS.items()
        if metric.headline
    ]
    return [
        *headlines,
        ("Cross-entropy", _change(metrics), f"clean → spliced, {METRICS['ce_recon'].unit}"),
        ("Trained", number(trained) if trained else "–", "tokens"),
        ("Training", f"{rate:,.0f}" if rate else "–", "tokens/s, median"),
        ("Harvest", f"{harvested:,.0f}" if _finite(harvested) else "–", "tokens/s"),
    ]


def _shown(metric: Metric, value: object) -> str:
    return metric.number(value) if _finite(value) else "–"


def _change(metrics: dict[str, Any]) -> str:
    ends = [(METRICS[name], metrics.get(name)) for name in ("ce_clean", "ce_recon")]
    if not all(_finite(value) for _, value in ends):
        return "–"
    return " → ".join(metric.number(value) for metric, value in ends)


def _finite(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _median_rate(log: TrainingLog) -> float | None:
    rates = [row.get("tokens_per_s") for rows in log.rows.values() for row in rows]
    known = [float(rate) for rate in rates if rate is not None and _finite(rate)]
    return statistics.median(known) if known else None


def _charts(log: TrainingLog) -> list[dict[str, str]]:
    charts = []
    for curve in CURVES:
        series = {
            name: [(_x(row), _scaled(row.get(curve.key), curve.scale)) for row in rows]
            for name, rows in log.rows.items()
        }
        svg = line_chart(series, label=curve.title, x_label="training tokens", log=curve.log)
        last = [points[-1][1] for points in series.values() if points]
        now = ", ".join(f"{value:.4g}" for value in last if math.isfinite(value))
        note = f"{curve.note}{', logarithmic' if curve.log else ''}".lstrip(", ")
        charts.append({"title": curve.title, "note": note, "now": now, "svg": svg})
    return charts


def _x(row: dict[str, Any]) -> float:
    tokens = row.get("tokens")
    return float(tokens if _finite(tokens) and tokens is not None else row["step"])


def _scaled(value: Any, scale: float) -> float:
    return float(value) * scale if _finite(value) else math.nan


def _metric_rows(metrics: dict[str, Any] | None) -> list[MetricRow] | None:
    """Return the metrics, then any other scalar entries of `eval/metrics.json`."""
    if metrics is None:
        return None
    rows = metric_rows(metrics)
    names = {row.name for row in rows}
    others = [
        MetricRow(key, value_text(value), "", "", "")
        for key, value in metrics.items()
        if key not in names and not isinstance(value, dict | list) and value is not None
    ]
    return [*rows, *others]


def _frequency(data: dict[str, Any] | None) -> dict[str, Any] | None:
    """Draw the histogram of log10(firings per token) and count the latents that never fired.

    Files of earlier commits do not say how many tokens there were to sample.
    """
    if data is None or not data.get("tokens"):
        return None
    tokens, counts = int(data["tokens"]), data["counts"]
    alive = [math.log10(count / tokens) for count in counts if count > 0]
    # The x axis ends at 0, which is one firing per token, and spans at least four decades.
    low = min([math.floor(min(alive, default=-1.0)), -4])
    bins_per_decade = 8
    edges = [low + i / bins_per_decade for i in range(-low * bins_per_decade + 1)]
    heights = [0] * (len(edges) - 1)
    for value in alive:
        heights[min(int((value - low) * bins_per_decade), len(heights) - 1)] += 1
    return {
        "svg": histogram(
            edges, heights, label="Firing frequency", x_label="log10 of firings per token"
        ),
        "tokens": tokens,
        "of_tokens": int(data.get("of_tokens", tokens)),
        "latents": len(counts),
        "never": len(counts) - len(alive),
        "median": f"{10 ** statistics.median(alive):.2e}" if alive else "–",
    }


def _norms(harvest: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Return a table for each hookpoint: its norms by position and by token.

    `harvest.json` of earlier commits has none.
    """
    tables = []
    for hookpoint, profile in (harvest or {}).get("norms", {}).items():
        rows = []
        for group in profile["by_position"]:
            span = f"{group['first']:,}" + (
                f" to {group['last']:,}" if group["last"] > group["first"] else ""
            )
            rows.append((f"position {span}", group))
        rows += [(f"token {group['token']!r}", group) for group in profile["by_token"]]
        tables.append({"hookpoint": hookpoint, "rows": rows})
    return tables


def _throughput(log: TrainingLog) -> list[tuple[str, str]]:
    """Return (name, value) of the throughput figures over the whole training log."""
    rows = [row for per_sae in log.rows.values() for row in per_sae]
    if not rows:
        return []
    found = []
    for title, key, form in (
        ("tokens/s, median", "tokens_per_s", "{:,.0f}"),
        ("loader wait, median", "loader_wait_fraction", "{:.1%}"),
        ("MFU, median", "mfu", "{:.1%}"),
    ):
        values = [float(row[key]) for row in rows if _finite(row.get(key))]
        found.append((title, form.format(statistics.median(values)) if values else "unknown"))
    peaks = [row["peak_memory_bytes"] for row in rows if _finite(row.get("peak_memory_bytes"))]
    found.append(("peak memory, rank 0", bytes_text(max(peaks)) if peaks else "unknown"))
    return found
