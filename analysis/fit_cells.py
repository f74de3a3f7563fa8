"""Reads the cells of a sweep: finished runs, with their sizes, curves and final losses."""

from __future__ import annotations

import glob
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from analysis.errors import FitError, RunFileError
from analysis.fit_curves import Curve
from analysis.runs import read_optional_json, read_training_log
from cluster.sweep_record import read_record
from conf.run_config import load_config
from conf.schema import RunConfig
from sae_core.checkpoint.folder import list_checkpoints, read_state
from sae_core.errors import CheckpointError, ConfigError
from sae_core.optimizer import peak_lr

CONFIG = "config.yaml"
TRAINING_METRICS = ("fvu", "loss")
HELDOUT_FVU = "heldout_fvu"
_RISE = 1.25
"""A final level this many times the lowest one means that training went wrong on the way."""
_EARLIEST = 0.1
"""Share of a run's tokens before which it is no point of the compute frontier."""


@dataclass(frozen=True)
class Cell:
    """One finished run of a sweep."""

    name: str
    n_latents: int
    k: int
    lr: float
    """Peak."""
    seed: int
    tokens: int
    """Trained on."""
    warmup_tokens: int
    decay_tokens: int
    d_model: int | None
    """None when the run kept no checkpoint."""
    source: str | None
    """Identity of the rows it was trained on; None when the run kept no checkpoint."""
    curves: dict[str, Curve]
    """Metric -> values over training tokens, as logged."""
    heldout_fvu: float | None
    """On held-out text, from `eval/metrics.json`; None where that was not measured."""

    def level(self, metric: str) -> float:
        """The final value: mean over the last 5% of the tokens, or what the evaluation measured."""
        if metric == HELDOUT_FVU:
            return math.nan if self.heldout_fvu is None else self.heldout_fvu
        return float(self.curves[metric].smooth().y[-1])

    def steady(self, metric: str) -> Curve:
        """The curve at the constant learning rate: after the warm-up, before the decay."""
        return self.training_curve(metric).between(
            self.warmup_tokens, self.tokens - self.decay_tokens
        )

    def training_curve(self, metric: str) -> Curve:
        """Of the metric; of the training FVU where the metric is the held-out one."""
        return self.curves["fvu" if metric == HELDOUT_FVU else metric]

    @property
    def flops_per_token(self) -> int | None:
        """2 L D for the encoder, and 2 k D each for the reconstruction and three sparse gradients.

        Dense autograd would take 12 L D: where k is small against L, six times as much, which
        moves L(C) along the axis and leaves its exponent alone. The auxiliary loss and the
        language model are not counted.
        """
        if self.d_model is None:
            return None
        return 2 * self.n_latents * self.d_model + 8 * self.k * self.d_model

    def over_compute(self, metric: str) -> Curve:
        """The smoothed curve over training FLOPs, without its first tenth and the warm-up."""
        assert self.flops_per_token is not None
        first = max(_EARLIEST * self.tokens, self.warmup_tokens)
        smooth = self.training_curve(metric).smooth().between(first, math.inf)
        return Curve(smooth.x * self.flops_per_token, smooth.y)


@dataclass(frozen=True)
class Sweep:
    """The cells that can be fitted, and why the others cannot."""

    folder: Path
    cells: tuple[Cell, ...]
    left_out: dict[str, str]
    """Name -> reason."""


class _Unusable(Exception):
    """Why a run is no cell; never leaves this module."""


def read_sweep(runs: str, metric: str) -> Sweep:
    """The cells under a folder, or those that a glob pattern matches.

    Unfinished, diverged and unreadable runs are left out with the reason.

    Args:
        runs: `fit.runs`.
        metric: `fit.metric`, which a cell must have.

    Raises:
        FitError: there is no run, or the cells were trained on different rows.
    """
    folder, found = _run_folders(runs)
    cells, left_out = [], {}
    for run_dir in found:
        name = run_dir.relative_to(folder).as_posix()
        try:
            cells.append(_read_cell(run_dir, name, metric))
        except _Unusable as reason:
            left_out[name] = str(reason)
    sources: dict[str, str] = {}
    for cell in cells:
        if cell.source is not None:
            sources.setdefault(cell.source, cell.name)
    if len(sources) > 1:
        shown = ", ".join(f"{name} on {source}" for source, name in sources.items())
        raise FitError(
            f"fit.runs={runs!r}: expected cells trained on the same activations, found {shown}; "
            "give a pattern that matches one store's cells"
        )
    return Sweep(folder, tuple(cells), left_out)


def best_of_each(cells: Sequence[Cell], metric: str) -> tuple[list[Cell], dict[str, str]]:
    """Of cells that differ only in learning rate or tokens, the one with the lowest final value.

    Returns:
        Those cells, sorted by n and k, and name -> reason of the others.
    """
    best: dict[tuple[int, int, int], Cell] = {}
    worse = {}
    for cell in sorted(cells, key=lambda cell: (cell.level(metric), cell.name)):
        key = (cell.n_latents, cell.k, cell.seed)
        if key in best:
            worse[cell.name] = f"{best[key].name} has the same n, k and seed, and a lower {metric}"
        else:
            best[key] = cell
    return [best[key] for key in sorted(best)], worse


def _run_folders(runs: str) -> tuple[Path, list[Path]]:
    """(the sweep's folder, the runs in it)."""
    path = Path(runs).expanduser().absolute()
    fixed = path
    while glob.has_magic(str(fixed)):
        fixed = fixed.parent
    pattern = str(path) if fixed != path else f"{glob.escape(str(path))}/*"
    found = [Path(match) for match in sorted(glob.glob(pattern))]
    found = [folder for folder in found if (folder / CONFIG).is_file()]
    if not found:
        raise FitError(
            f"fit.runs={runs!r}: expected a folder of runs, or a pattern of run folders; none of "
            f"what matches {pattern} holds a {CONFIG}"
        )
    return fixed, found


def _read_cell(run_dir: Path, name: str, metric: str) -> Cell:
    try:
        config = load_config(run_dir / CONFIG)
        evaluation = read_optional_json(run_dir / "eval" / "metrics.json") or {}
    except (ConfigError, RunFileError, OSError) as error:
        raise _Unusable(f"cannot be read: {str(error).splitlines()[0]}") from error
    record = read_record(run_dir)
    if record is not None:
        raise _Unusable(f"{record.state}: {record.reason}")
    curves = _curves(run_dir, config)
    heldout = evaluation.get("fvu") if evaluation.get("heldout") else None
    if metric == HELDOUT_FVU and not (isinstance(heldout, float) and heldout > 0):
        raise _Unusable("no FVU of held-out text: run stage=evaluate on it")
    d_model, source = _checkpoint_facts(run_dir)
    return Cell(
        name=name,
        n_latents=config.sae.n_latents,
        k=config.sae.k,
        lr=peak_lr(config.optim, config.sae.n_latents),
        seed=config.seed,
        tokens=config.train.n_steps * config.train.batch_tokens,
        warmup_tokens=config.optim.warmup_tokens,
        decay_tokens=config.optim.decay_tokens,
        d_model=d_model,
        source=source,
        curves=curves,
        heldout_fvu=heldout,
    )


def _curves(run_dir: Path, config: RunConfig) -> dict[str, Curve]:
    saes = read_training_log(run_dir / "metrics.jsonl").rows
    if len(saes) != 1:
        raise _Unusable(f"metrics.jsonl holds {len(saes)} SAEs, expected 1")
    (rows,) = saes.values()
    step, wanted = rows[-1]["step"], config.train.n_steps
    if step < wanted:
        raise _Unusable(f"unfinished: step {step} of {wanted}; the same command resumes it")
    return {metric: _checked(metric, rows) for metric in TRAINING_METRICS}


def _checked(metric: str, rows: list[dict[str, Any]]) -> Curve:
    """The curve, of a run that did not diverge."""
    tokens = np.array([_number(row.get("tokens")) for row in rows])
    values = np.array([_number(row.get(metric)) for row in rows])
    known = np.isfinite(tokens) & np.isfinite(values)
    if not known[-1]:
        raise _Unusable(f"diverged: its last {metric} is not finite")
    smooth = Curve(tokens[known], values[known]).smooth()
    last, lowest = smooth.y[-1], smooth.y.min()
    if last <= 0:
        raise _Unusable(f"its final {metric} is {last:.4g}, expected more than 0")
    if last >= 1 or last > _RISE * lowest:
        raise _Unusable(f"diverged: {metric} ended at {last:.4g}, its lowest was {lowest:.4g}")
    return Curve(tokens[known], values[known])


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else math.nan


def _checkpoint_facts(run_dir: Path) -> tuple[int | None, str | None]:
    """(d_model, identity of the rows) of the newest checkpoint that can be read."""
    for folder in list_checkpoints(run_dir / "checkpoints"):
        try:
            state = read_state(folder)
        except CheckpointError:
            continue  # the weights are not needed here, and any of the checkpoints will do
        return state.d_model, state.source_identity
    return None, None
