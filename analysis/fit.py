"""Fit stage: scaling laws of a sweep, as tables, coefficients, figures and a page."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from analysis.fit_cells import Cell, read_sweep
from analysis.fit_laws import LEVEL, Interval
from analysis.fit_study import Result, Study, study_sweep
from sae_core.atomic import write_json

if TYPE_CHECKING:
    from conf.schema import RunConfig

DEFINITIONS = {
    "fvu, loss": "of a cell: mean over the last 5% of its training tokens, as logged",
    "heldout_fvu": "of a cell: fvu of eval/metrics.json, measured on held-out text",
    "fit": "Huber's loss on log residuals, linear beyond 1.345 robust standard deviations, the "
    "best of several starts",
    "interval": "95%, percentiles of the bootstrap over the cells' residuals, stretched by "
    "Student's t over the normal's quantile for the cells that are spare; L(C): the residuals of a "
    "cell stay together (wild bootstrap, Webb weights), and with few cells on the frontier the "
    "interval is a rough one",
    "held_out": "the law fitted again without the cells of the largest n; the interval is that of "
    "a new cell, noise included",
    "L(C)": "lower envelope of the cells' smoothed curves over training FLOPs, all cells of one k, "
    "from a tenth of each cell's tokens on",
    "flops": "2 L D + 8 k D a token: the dense encoder and the sparse rest; without the auxiliary "
    "loss and the language model",
    "T(n)": "tokens at which the smoothed loss first comes within 1% of its final level, that "
    "before the learning rate decays; left out where it is at once, or in the last fifth",
    "cells": "of runs with the same n, k and seed, the one with the lowest final value; L(C) takes "
    "them all",
}


def run(config: RunConfig, run_dir: Path) -> None:
    """Writes `<sweep>/fit/`: cells.csv, points.csv, fit.json, figures, index.html.

    Raises:
        FitError: there are no runs, or their cells allow no law.
    """
    options = config.fit
    sweep = read_sweep(options.runs or str(run_dir), options.metric)
    study = study_sweep(sweep, options.metric, options.hold_out, options.bootstrap, config.seed)
    folder = sweep.folder / "fit"
    write_study(study, folder)
    for name, reason in sweep.left_out.items():
        print(f"fit: left out {name}: {reason}")
    for title, reason in study.not_fitted.items():
        print(f"fit: no {title}: {reason}")
    for result in study.results:
        print(f"fit: {summary(result)}")
    print(f"fit: {folder / 'index.html'}")


def summary(result: Result) -> str:
    """`L(n) at k = 32: a 2.01 [1.92, 2.1], b …; n65536 forecast 0.10 [0.09, 0.11], …`."""
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
    """All files of the study; the page last, so that it never shows figures that are not there."""
    from analysis.fit_page import figures, render
    from analysis.png import to_png

    folder.mkdir(parents=True, exist_ok=True)
    _write_csv(folder / "cells.csv", [_cell_row(cell, study) for cell in study.sweep.cells])
    _write_csv(folder / "points.csv", [row for r in study.results for row in _point_rows(r)])
    write_json(folder / "fit.json", as_json(study))
    for name, svg in figures(study).items():
        _write(folder / f"{name}.svg", svg)
        (folder / f"{name}.png").write_bytes(to_png(svg))
    _write(folder / "index.html", render(study, DEFINITIONS))


def as_json(study: Study) -> dict[str, Any]:
    """Coefficients, intervals and what was left out, as plain values."""
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
    }


def _plain(found: Interval) -> dict[str, float | None]:
    """JSON has no infinity: null where an end is not known."""
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
