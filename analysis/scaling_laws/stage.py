"""Fit stage: fit scaling laws to a sweep and write tables, coefficients, figures and a page."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from analysis.evaluation.metrics import METRICS
from analysis.scaling_laws.cells import HELDOUT_FVU, HELDOUT_METRIC, Cell, read_sweep
from analysis.scaling_laws.judgement import objections, verdict
from analysis.scaling_laws.laws import LEVEL, Interval
from analysis.scaling_laws.study import Result, Study, study_sweep
from cluster.run_folder.files import FIT
from foundation.atomic_files import write_json

if TYPE_CHECKING:
    from conf.schema.run import RunConfig

DEFINITIONS = {
    "fvu, loss": "mean of the logged values over the last 5% of a cell's training tokens",
    HELDOUT_FVU: f"{HELDOUT_METRIC} from a cell's eval/metrics.json, measured on held-out text: "
    f"{METRICS[HELDOUT_METRIC].definition}",
    "fit": "Huber's loss on log residuals, linear beyond 1.345 robust standard deviations; best of "
    "several start points",
    "interval": "95% interval: percentiles of a bootstrap over the residuals of the cells, "
    "stretched by the quantile of Student's t over that of the normal distribution to correct for "
    "few degrees of freedom. For L(C) the residuals of each cell are kept together (wild "
    "bootstrap, Webb weights); with few cells on the frontier this interval is rough",
    "held_out": "cells of the largest n, forecast by a fit without them; the interval is for a new "
    "cell and includes its noise",
    "L(C)": "fit to the lower envelope of the smoothed curves of all cells of one k over training "
    "FLOPs, without the warm-up and the first tenth of each cell's tokens",
    "flops": "2 L D + 8 k D per token: the dense encoder and the sparse operations. The auxiliary "
    "loss and the language model are not counted",
    "T(n)": "fit to the tokens at which the smoothed loss first comes within 1% of its level at "
    "the end of the constant learning rate; cells that converge within the first 5% or in the last "
    "fifth of these tokens are left out",
    "cells": "of the runs with the same n, k and seed, only the one with the lowest final value is "
    "used; L(C) uses all of them",
}


def run(config: RunConfig, run_dir: Path) -> None:
    """Write cells.csv, points.csv, fit.json, the figures and index.html to `<sweep>/fit/`.

    Raises:
        FitError: If no runs are found, or if no law can be fitted to their cells.
    """
    options = config.fit
    sweep = read_sweep(options.runs or str(run_dir), options.metric)
    study = study_sweep(sweep, options.metric, options.hold_out, options.bootstrap, config.seed)
    folder = sweep.folder / FIT
    write_study(study, folder)
    for name, reason in sweep.left_out.items():
        print(f"fit: left out {name}: {reason}")
    for title, reason in study.not_fitted.items():
        print(f"fit: did not fit {title}: {reason}")
    for result in study.results:
        print(f"fit: {summary(result)}")
        print(f"fit: {result.title}: {verdict(result)}")
    print(f"fit: {folder / 'index.html'}")


def summary(result: Result) -> str:
    """Summarise a law in one line, with its coefficients, intervals and forecasts.

    For example `L(n) at k = 32: a 2.01 [1.92, 2.1], b …; n65536 forecast 0.10 [0.09, 0.11], …`.
    """
    parts = [
        f"{name} {found.value:.4g} [{found.low:.4g}, {found.high:.4g}]"
        for name, found in result.fit.coefficients().items()
    ]
    held = [
        f"; {cell.name} forecast {cell.forecast.value:.4g} "
        f"[{cell.forecast.low:.4g}, {cell.forecast.high:.4g}], "
        f"measured {cell.measured:.4g} ({cell.error:+.1%})"
        for cell in result.held_out
    ]
    return f"{result.title}: {', '.join(parts)}{''.join(held)}"


def write_study(study: Study, folder: Path) -> None:
    """Write all files of the study.

    The page is written last, so that it never describes files that do not exist yet.
    """
    from analysis.pages.png import to_png
    from analysis.pages.scaling_page import figures, render

    folder.mkdir(parents=True, exist_ok=True)
    _write_csv(folder / "cells.csv", [_cell_row(cell, study) for cell in study.sweep.cells])
    _write_csv(folder / "points.csv", [row for r in study.results for row in _point_rows(r)])
    write_json(folder / "fit.json", as_json(study))
    for name, svg in figures(study).items():
        _write(folder / f"{name}.svg", svg)
        (folder / f"{name}.png").write_bytes(to_png(svg))
    _write(folder / "index.html", render(study, DEFINITIONS))


def as_json(study: Study) -> dict[str, Any]:
    """Return the content of fit.json: coefficients, intervals, and what was left out and why."""
    return {
        "metric": study.metric,
        "interval_level": LEVEL,
        "laws": [_law_json(result) for result in study.results],
        "not_fitted": study.not_fitted,
        "cells": [cell.name for cell in study.cells],
        "left_out": {**study.sweep.left_out, **study.worse},
        "definitions": DEFINITIONS,
    }


def _law_json(result: Result) -> dict[str, Any]:
    return {
        "law": result.law.name,
        "formula": result.law.formula,
        "k": result.k,
        "points": len(result.y),
        "spare": result.fit.spare,
        "coefficients": {name: _plain(found) for name, found in result.fit.coefficients().items()},
        "residual_rms": float((result.fit.residuals**2).mean() ** 0.5),
        "held_out": [
            {
                "name": cell.name,
                "measured": cell.measured,
                "forecast": _plain(cell.forecast),
                "error": cell.error,
            }
            for cell in result.held_out
        ],
        "not_held_out": result.not_held_out,
        "objections": objections(result),
    }


def _plain(found: Interval) -> dict[str, float | None]:
    """Convert an interval for JSON. An unknown end becomes null, because JSON has no infinity."""
    return {key: value if math.isfinite(value) else None for key, value in asdict(found).items()}


def _cell_row(cell: Cell, study: Study) -> dict[str, Any]:
    flops = cell.flops_per_token
    return {
        "name": cell.name,
        "n_latents": cell.n_latents,
        "k": cell.k,
        "lr": cell.lr,
        "seed": cell.seed,
        "tokens": cell.tokens,
        "d_model": cell.d_model,
        "flops_per_token": flops,
        "flops": None if flops is None else flops * cell.tokens,
        "fvu": cell.level("fvu"),
        "loss": cell.level("loss"),
        "heldout_fvu": cell.heldout_fvu,
        "tokens_to_convergence": study.tokens_to_convergence[cell.name],
        "left_out": study.worse.get(cell.name),
    }


def _point_rows(result: Result) -> Iterable[dict[str, Any]]:
    fitted, low, high = result.fit.curve(result.x)
    for i, name in enumerate(result.names):
        row = dict.fromkeys(("n", "k", "C"))
        row |= dict(zip(result.law.variables, map(float, result.x[i]), strict=True))
        yield {
            "law": result.title,
            "cell": name,
            **row,
            "measured": float(result.y[i]),
            "fitted": float(fitted[i]),
            "low": float(low[i]),
            "high": float(high[i]),
            "log_residual": float(result.fit.residuals[i]),
        }


def _write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
