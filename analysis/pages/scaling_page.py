"""Draw the figures of a scaling-law study and render the offline page that shows them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from analysis.evaluation.metrics import METRICS
from analysis.number_format import number
from analysis.pages.svg import N_COLOURS, Layer, Point, fit_chart, standalone, thin
from analysis.scaling_laws.cells import HELDOUT_METRIC, Cell
from analysis.scaling_laws.judgement import objections, verdict
from analysis.scaling_laws.laws import COMPUTE_LAW, JOINT_LAW, Interval
from analysis.scaling_laws.study import Result, Study

TEMPLATES = Path(__file__).parent / "templates"
_SAMPLES = 80
"""Number of x values at which a fitted curve is drawn."""
_BEYOND = 2.0
"""Factor by which a curve extends beyond the largest x, and beyond the range of y."""
_X_LABELS = {"n": "latents", "C": "training FLOPs"}


@dataclass(frozen=True)
class Section:
    """Contents of the page's section about one law."""

    title: str
    formula: str
    note: str
    """Number of points and of coefficients."""
    verdict: str
    """Reasons not to rely on the law, or how well it fits."""
    is_doubtful: bool
    """Whether there is a reason not to rely on the law."""
    svg: str
    """Chart of the points and the fit."""
    residuals_svg: str
    """Chart of the residuals."""
    legend: list[tuple[int, str]]
    """Rows of (number of the colour, label)."""
    coefficients: list[tuple[str, str, str]]
    """Rows of (name, value, interval)."""
    held_out: list[tuple[str, str, str, str, str]]
    """Rows of (cell, measured, forecast, interval, error)."""
    not_held_out: str | None
    """Reason why no cell was held out."""


def figures(study: Study) -> dict[str, str]:
    """Draw two figures for each law and return them as file name without suffix -> SVG file."""
    css = (TEMPLATES / "figure.css").read_text(encoding="utf-8")
    found: dict[str, str] = {}
    for result in study.results:
        name = _file_name(result)
        charts = {name: chart(result), f"{name}-residuals": _residuals(result)}
        found |= {name: standalone(svg, css) for name, svg in charts.items()}
    return found


def render(study: Study, definitions: Mapping[str, str]) -> str:
    """Render the page as HTML. The template escapes all names and values."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined
    )
    return environment.get_template("scaling.html.j2").render(
        name=study.sweep.folder.name,
        metric=study.metric,
        created=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        tiles=_tiles(study),
        sections=[_section(result) for result in study.results],
        not_fitted=study.not_fitted,
        cells=[_cell_row(cell, study) for cell in study.sweep.cells],
        left_out={**study.sweep.left_out, **study.worse},
        definitions=definitions,
        heldout_title=f"held-out {METRICS[HELDOUT_METRIC].title}",
    )


def chart(result: Result) -> str:
    """Draw the points and the curve of a law; for L(n, k), one curve over n for each k."""
    layers = [
        Layer(name, 5, line=thin(_pairs(curve.x, curve.y)), style="faint")
        for name, curve in result.curves
    ]
    label, x_label = result.title, _X_LABELS[result.law.variables[0]]
    return fit_chart([*layers, *_layers(result)], label=label, x_label=x_label)


def _layers(result: Result) -> list[Layer]:
    """Return one layer for each group: its points, the fitted curve and the curve's interval."""
    held_out = {cell.name for cell in result.held_out}
    layers = []
    for colour, (name, members) in enumerate(_groups(result).items()):
        x, y = result.x[members], result.y[members]
        points = _pairs(x[:, 0], y)
        # The curve runs over the first variable; a second one is constant within the group.
        grid = np.geomspace(x[:, 0].min() / 1.2, x[:, 0].max() * _BEYOND, _SAMPLES)
        inputs = np.stack([grid, *(np.full_like(grid, value) for value in x[0, 1:])], axis=1)
        value, low, high = result.fit.curve(inputs)
        # Cut the curve off where it is far above or below the points. The points would otherwise be
        # squeezed into a small part of the chart.
        near = (value > y.min() / _BEYOND) & (value < y.max() * _BEYOND)
        grid, value, low, high = grid[near], value[near], low[near], high[near]
        is_out = [result.names[i] in held_out for i in members]
        layers.append(
            Layer(
                name,
                colour,
                dots=[point for point, out in zip(points, is_out, strict=True) if not out],
                rings=[point for point, out in zip(points, is_out, strict=True) if out],
                line=_pairs(grid, value),
                band=[
                    (float(a), float(b), float(c)) for a, b, c in zip(grid, low, high, strict=True)
                ],
            )
        )
    return layers


def _residuals(result: Result) -> str:
    """Draw how far each point lies above the fit, in per cent."""
    percent = 100 * np.expm1(result.fit.residuals)
    first = result.x[:, 0]
    ends = [(float(first.min()), 0.0), (float(first.max()), 0.0)]
    layers = [Layer("fit", 5, line=ends, style="dashed")]
    for colour, (name, members) in enumerate(_groups(result).items()):
        layers.append(Layer(name, colour, dots=_pairs(first[members], percent[members])))
    label = f"Residuals of {result.title}"
    return fit_chart(layers, label=label, x_label=_X_LABELS[result.law.variables[0]], log=False)


def _groups(result: Result) -> dict[str, list[int]]:
    """Group the points by colour; return label -> indices of the points.

    The joint law has one group for each k, every other law a single group.
    """
    if result.law is not JOINT_LAW:
        return {result.title: list(range(len(result.y)))}
    found: dict[str, list[int]] = {}
    for i in np.lexsort(result.x.T):
        found.setdefault(f"k = {result.x[i, 1]:.0f}", []).append(int(i))
    return found


def _section(result: Result) -> Section:
    what = "points on the frontier" if result.law is COMPUTE_LAW else "cells"
    groups = _groups(result) if result.law is JOINT_LAW else {}
    return Section(
        title=result.title,
        formula=result.law.formula,
        note=f"{len(result.y)} {what}, {len(result.fit.theta)} coefficients",
        verdict=verdict(result),
        is_doubtful=bool(objections(result)),
        svg=chart(result),
        residuals_svg=_residuals(result),
        legend=[(colour % N_COLOURS, name) for colour, name in enumerate(groups)],
        coefficients=[
            (name, f"{found.value:.4g}", _ends(found))
            for name, found in result.fit.coefficients().items()
        ],
        held_out=[
            (
                cell.name,
                f"{cell.measured:.5g}",
                f"{cell.forecast.value:.5g}",
                _ends(cell.forecast),
                f"{cell.error:+.2%}",
            )
            for cell in result.held_out
        ],
        not_held_out=result.not_held_out,
    )


def _tiles(study: Study) -> list[tuple[str, str, str]]:
    """Return (title, value, note) for each tile at the top of the page."""
    held = [cell for result in study.results for cell in result.held_out]
    worst = max((abs(cell.error) for cell in held), default=None)
    inside = sum(cell.forecast.low <= cell.measured <= cell.forecast.high for cell in held)
    left_out = len(study.sweep.left_out)
    return [
        ("Cells", str(len(study.cells)), f"{left_out} left out, {len(study.worse)} superseded"),
        ("Laws", str(len(study.results)), f"{len(study.not_fitted)} not fitted"),
        ("Metric", study.metric, "final value of each cell"),
        ("Worst forecast", "–" if worst is None else f"{worst:.2%}", "error on held-out cells"),
        ("Held out", f"{inside}/{len(held)}" if held else "–", "inside their 95% intervals"),
    ]


def _cell_row(cell: Cell, study: Study) -> tuple[str, ...]:
    tokens, flops = study.tokens_to_convergence[cell.name], cell.flops_per_token
    return (
        cell.name,
        f"{cell.n_latents:,}",
        str(cell.k),
        f"{cell.lr:.3g}",
        str(cell.seed),
        number(cell.tokens),
        "–" if flops is None else f"{flops * cell.tokens:.3g}",
        f"{cell.level('fvu'):.5g}",
        f"{cell.level('loss'):.5g}",
        "–" if cell.heldout_fvu is None else METRICS[HELDOUT_METRIC].number(cell.heldout_fvu),
        "–" if tokens is None else number(tokens),
    )


def _ends(found: Interval) -> str:
    return f"{found.low:.4g} to {found.high:.4g}"


def _pairs(x: Any, y: Any) -> list[Point]:
    return [(float(a), float(b)) for a, b in zip(x, y, strict=True)]


def _file_name(result: Result) -> str:
    """Return the name of a figure's file without suffix, e.g. `loss-n-k32`."""
    name = {"L(n)": "loss-n", "L(n, k)": "loss-n-k", "L(C)": "loss-compute", "T(n)": "tokens-n"}
    return name[result.law.name] + ("" if result.k is None else f"-k{result.k}")
