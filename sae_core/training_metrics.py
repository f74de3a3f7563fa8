"""The training metrics: name, unit, description, and how each is reduced. Does not import torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Totals:
    """Sums over all ranks and over the steps since the last report."""

    sums: Mapping[str, float]
    """Sums of the scalars of `StepOutput` (`loss`, `squared_error`, `n_active`, and those of the
    architecture), and of `dead` latents at the time of the report, over all ranks."""
    steps: int
    """Number of steps times number of ranks."""
    rows: int
    """Number of batch rows, over all data replicas."""
    replicas: int
    """Number of data replicas."""
    shards: int
    """Number of dictionary shards. Scalars that are equal on all shards are summed once per shard.
    """
    n_latents: int
    """Number of latents in the dictionary."""
    variance: float
    """Squared distance of the normalised inputs from their mean, summed over all rows."""
    grad_norm: float
    """Gradient norm of the last step, before clipping."""
    lr: float
    """Learning rate of the last step."""


@dataclass(frozen=True)
class TrainingMetric:
    """One value in a row of the training log."""

    name: str
    """Key in the row."""
    unit: str
    """Unit; empty for a ratio."""
    description: str
    """Description of the metric, as a noun phrase."""
    reduce: Callable[[Totals], float]
    """Function that computes the value of a row."""


def mean_over_steps(name: str) -> Callable[[Totals], float]:
    """Return a function that computes the mean of a `StepOutput` scalar over steps and ranks."""
    return lambda totals: totals.sums[name] / totals.steps


def mean_over_rows(name: str) -> Callable[[Totals], float]:
    """Return a function that divides a scalar, summed over all ranks, by the number of rows."""
    return lambda totals: totals.sums[name] / totals.rows


def _fvu(totals: Totals) -> float:
    if totals.variance <= 0:
        return math.nan
    return totals.sums["squared_error"] / totals.shards / totals.variance


TRAINING_METRICS = (
    TrainingMetric(
        "loss", "", "loss of the global batch, mean over steps", mean_over_steps("loss")
    ),
    TrainingMetric("fvu", "", "fraction of variance unexplained, over all rows", _fvu),
    TrainingMetric(
        "l0",
        "latents/token",
        "active latents per token, mean over rows",
        mean_over_rows("n_active"),
    ),
    TrainingMetric(
        "dead_fraction",
        "",
        "fraction of latents that have not fired for sae.dead_after_tokens tokens",
        lambda totals: totals.sums["dead"] / totals.replicas / totals.n_latents,
    ),
    TrainingMetric(
        "grad_norm",
        "",
        "gradient norm of the last step, before clipping",
        lambda totals: totals.grad_norm,
    ),
    TrainingMetric("lr", "", "learning rate of the last step", lambda totals: totals.lr),
)
"""The metrics that every architecture has."""


TRAINER_KEYS = (
    *("time", "step", "tokens", "sae", "tokens_per_s", "loader_wait_fraction"),
    *("checkpoint_pause_s", "mfu", "peak_memory_bytes"),
)
"""Keys of a row of the training log that the trainer fills in itself."""


def with_own(own: tuple[TrainingMetric, ...]) -> tuple[TrainingMetric, ...]:
    """Return the metrics of a row, with those of an architecture after the losses.

    Raises:
        ValueError: If two metrics have the same name, or a metric has a name that the trainer uses
            itself.
    """
    names = [metric.name for metric in (*TRAINING_METRICS, *own)]
    twice = {name for name in names if names.count(name) > 1 or name in TRAINER_KEYS}
    if twice:
        raise ValueError(f"training metrics {sorted(twice)}: expected names that are not used yet")
    return (*TRAINING_METRICS[:2], *own, *TRAINING_METRICS[2:])
