"""Read the cells of a sweep: finished runs with their sizes, curves and final losses."""

from __future__ import annotations

import glob
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from analysis.errors import FitError
from analysis.scaling_laws.curves import Curve
from cluster.run_folder.contents import read_optional_json
from cluster.run_folder.errors import RunFileError
from cluster.run_folder.files import CHECKPOINTS, CONFIG, EVALUATION, METRICS
from cluster.run_folder.metrics_log import read_training_log
from cluster.run_folder.saved_config import load_config
from cluster.run_folder.sweep_record import read_record
from conf.schema.run import RunConfig
from foundation.errors import ConfigError
from sae_core.checkpoint.folder import list_checkpoints, read_state
from sae_core.engine.lr_schedule import peak_lr
from sae_core.errors import CheckpointError

TRAINING_METRICS = ("fvu", "loss")
HELDOUT_FVU = "heldout_fvu"
"""The evaluation metric `HELDOUT_METRIC`, if it was measured on held-out text."""
HELDOUT_METRIC = "fvu"
_RISE = 1.25
"""A run whose final loss exceeds its lowest loss by more than this factor counts as diverged."""
_EARLIEST = 0.1
"""Fraction of a run's tokens, from its start, that is excluded from the compute frontier."""


@dataclass(frozen=True)
class Cell:
    """One finished run of a sweep."""

    name: str
    architecture: str
    n_latents: int
    k: int
    """Active latents per row."""
    lr: float
    """Peak learning rate."""
    seed: int
    tokens: int
    """Number of tokens the run was trained on."""
    warmup_tokens: int
    decay_tokens: int
    d_model: int | None
    """Width of the rows; None if the run has no readable checkpoint."""
    source: str | None
    """Identity of the training rows; None if the run has no readable checkpoint."""
    curves: dict[str, Curve]
    """Metric -> values over training tokens, as logged."""
    heldout_fvu: float | None
    """FVU on held-out text, from `eval/metrics.json`; None if it was not measured."""

    def level(self, metric: str) -> float:
        """Return the final value of a metric.

        This is the mean over the last 5% of the tokens. For `heldout_fvu`, it is the value that the
        evaluation measured, or NaN if it was not measured.
        """
        if metric == HELDOUT_FVU:
            return math.nan if self.heldout_fvu is None else self.heldout_fvu
        return float(self.curves[metric].smooth().y[-1])

    def steady(self, metric: str) -> Curve:
        """Return the part of the curve at the constant learning rate, between warm-up and decay."""
        return self.training_curve(metric).between(
            self.warmup_tokens, self.tokens - self.decay_tokens
        )

    def training_curve(self, metric: str) -> Curve:
        """Return the logged curve of the metric or, for `heldout_fvu`, of the training FVU."""
        return self.curves["fvu" if metric == HELDOUT_FVU else metric]

    @property
    def flops_per_token(self) -> int | None:
        """Training FLOPs per token, 2 L D + 8 k D; None if d_model is unknown.

        The encoder takes 2 L D; the reconstruction and the three sparse gradients take 2 k D each.
        Dense autograd would take 12 L D, six times as much when k is much smaller than L. Counting
        12 L D would shift L(C) along the compute axis but not change its exponent. The auxiliary
        loss and the language model are not counted.
        """
        if self.d_model is None:
            return None
        return 2 * self.n_latents * self.d_model + 8 * self.k * self.d_model

    def over_compute(self, metric: str) -> Curve:
        """Return the smoothed curve over training FLOPs, without the first tenth and the warm-up.

        `d_model` must be known.
        """
        assert self.flops_per_token is not None
        first = max(_EARLIEST * self.tokens, self.warmup_tokens)
        smooth = self.training_curve(metric).smooth().between(first, math.inf)
        return Curve(smooth.x * self.flops_per_token, smooth.y)


@dataclass(frozen=True)
class Sweep:
    """The cells of a sweep that can be fitted, and the reasons why other runs cannot."""

    folder: Path
    cells: tuple[Cell, ...]
    left_out: dict[str, str]
    """Name of each unusable run -> reason."""


class _Unusable(Exception):
    """The reason why a run cannot be used as a cell; caught within this module."""


def read_sweep(runs: str, metric: str) -> Sweep:
    """Read the cells in a folder of runs, or those that match a glob pattern.

    Unfinished, diverged and unreadable runs are left out; `Sweep.left_out` gives the reasons.

    Args:
        runs: The setting `fit.runs`: a folder of run folders, or a glob pattern of run folders.
        metric: The setting `fit.metric`. Runs without this metric are left out.

    Raises:
        FitError: If no run is found, or if the cells were trained on different rows or
            have different architectures.
    """
    folder, found = _run_folders(runs)
    cells, left_out = [], {}
    for run_dir in found:
        name = run_dir.relative_to(folder).as_posix()
        try:
            cells.append(_read_cell(run_dir, name, metric))
        except _Unusable as reason:
            left_out[name] = str(reason)
    architectures = sorted({cell.architecture for cell in cells})
    if len(architectures) > 1:
        raise FitError(
            f"fit.runs={runs!r}: expected cells of one architecture, found "
            f"{', '.join(architectures)}; use a pattern that matches only the cells of one "
            "architecture"
        )
    sources: dict[str, str] = {}
    for cell in cells:
        if cell.source is not None:
            sources.setdefault(cell.source, cell.name)
    if len(sources) > 1:
        shown = ", ".join(f"{name} on {source}" for source, name in sources.items())
        raise FitError(
            f"fit.runs={runs!r}: expected cells trained on the same activations, found {shown}; "
            "use a pattern that matches only the cells of one store"
        )
    return Sweep(folder, tuple(cells), left_out)


def best_of_each(cells: Sequence[Cell], metric: str) -> tuple[list[Cell], dict[str, str]]:
    """Select the cell with the lowest final value for each combination of n, k and seed.

    Cells with the same n, k and seed differ only in settings such as learning rate or tokens.

    Returns:
        The selected cells, sorted by n, k and seed, and a mapping from the name of each other cell
        to the reason why it was not selected.
    """
    best: dict[tuple[int, int, int], Cell] = {}
    worse = {}
    for cell in sorted(cells, key=lambda cell: (cell.level(metric), cell.name)):
        key = (cell.n_latents, cell.k, cell.seed)
        if key in best:
            worse[cell.name] = (
                f"{best[key].name} has the same n, k and seed, and a {metric} that is not higher"
            )
        else:
            best[key] = cell
    return [best[key] for key in sorted(best)], worse


def _run_folders(runs: str) -> tuple[Path, list[Path]]:
    """Return the folder of the sweep and the run folders in it."""
    path = Path(runs).expanduser().absolute()
    # The sweep's folder is the part of the path before the first wildcard.
    fixed = path
    while glob.has_magic(str(fixed)):
        fixed = fixed.parent
    pattern = str(path) if fixed != path else f"{glob.escape(str(path))}/*"
    found = [Path(match) for match in sorted(glob.glob(pattern))]
    found = [folder for folder in found if (folder / CONFIG).is_file()]
    if not found:
        raise FitError(
            f"fit.runs={runs!r}: expected a folder of runs, or a pattern of run folders; no folder "
            f"that matches {pattern} contains {CONFIG}"
        )
    return fixed, found


def _read_cell(run_dir: Path, name: str, metric: str) -> Cell:
    try:
        config = load_config(run_dir / CONFIG)
        evaluation = read_optional_json(run_dir / EVALUATION) or {}
    except (ConfigError, RunFileError, OSError) as error:
        raise _Unusable(f"unreadable: {str(error).splitlines()[0]}") from error
    record = read_record(run_dir)
    if record is not None:
        raise _Unusable(f"{record.state}: {record.reason}")
    curves = _curves(run_dir, config)
    heldout = evaluation.get(HELDOUT_METRIC) if evaluation.get("heldout") else None
    if metric == HELDOUT_FVU and not (isinstance(heldout, float) and heldout > 0):
        raise _Unusable("no FVU on held-out text: run stage=evaluate on this run")
    active = config.sae.active_latents()
    if active is None:
        raise _Unusable(
            f"the laws need a fixed number of active latents, which {config.sae.architecture} does "
            "not have"
        )
    d_model, source = _checkpoint_facts(run_dir)
    return Cell(
        name=name,
        architecture=config.sae.architecture,
        n_latents=config.sae.n_latents,
        k=active,
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
    saes = read_training_log(run_dir).rows
    if len(saes) != 1:
        raise _Unusable(f"{METRICS} contains {len(saes)} SAEs, expected 1")
    (rows,) = saes.values()
    step, wanted = rows[-1]["step"], config.train.n_steps
    if step < wanted:
        raise _Unusable(
            f"unfinished: step {step} of {wanted}; rerun the command of this run to resume it"
        )
    return {metric: _checked(metric, rows) for metric in TRAINING_METRICS}


def _checked(metric: str, rows: list[dict[str, Any]]) -> Curve:
    """Return the curve of a metric.

    Raises:
        _Unusable: If the run diverged, or if its final value is not positive.
    """
    tokens = np.array([_number(row.get("tokens")) for row in rows])
    values = np.array([_number(row.get(metric)) for row in rows])
    known = np.isfinite(tokens) & np.isfinite(values)
    if not known[-1]:
        raise _Unusable(f"diverged: its last {metric} is not finite")
    smooth = Curve(tokens[known], values[known]).smooth()
    last, lowest = smooth.y[-1], smooth.y.min()
    if last <= 0:
        raise _Unusable(f"final {metric} is {last:.4g}, expected more than 0")
    # An SAE that always outputs the mean of the rows has an FVU of 1.
    if last >= 1 or last > _RISE * lowest:
        raise _Unusable(f"diverged: {metric} ended at {last:.4g}; its lowest was {lowest:.4g}")
    return Curve(tokens[known], values[known])


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else math.nan


def _checkpoint_facts(run_dir: Path) -> tuple[int | None, str | None]:
    """Return d_model and the identity of the rows from the newest readable checkpoint."""
    for folder in list_checkpoints(run_dir / CHECKPOINTS):
        try:
            state = read_state(folder)
        except CheckpointError:
            continue  # d_model and the rows are the same in all checkpoints of a run
        return state.d_model, state.source_identity
    return None, None
