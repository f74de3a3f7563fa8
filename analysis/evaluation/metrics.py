"""The evaluation metrics: names, definitions, units, formats, and how each one is computed.

`eval/metrics.json`, the console, the run page, the model card and `stage=status` show the metrics
in the order of `METRICS`. To add a metric, register a `Metric` there. `Accumulator` describes the
data that it may use.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from analysis.evaluation.measurement import CLEAN, MEAN, RECON, ZERO, Accumulator, Measured
from analysis.evaluation.predictions import PredictionSums
from analysis.evaluation.reconstruction import ReconstructionSums
from analysis.number_format import value_text
from foundation.registry import Registry


@dataclass(frozen=True)
class Metric:
    """One evaluation metric. Its name is the name under which it is registered."""

    title: str
    """Human-readable name, for headings and tables."""
    definition: str
    """Exact definition of the value, written to `eval/metrics.json` together with the value."""
    value: Callable[[Measured], float | int | None]
    """Computes the value, or None if the evaluation did not measure what the metric needs."""
    accumulator: type[Accumulator] | None = None
    """Class of the sums that `value` reads. Metrics that name the same class share one instance."""
    unit: str = ""
    """Shown after the value; empty for a plain ratio."""
    format: str = ".4g"
    """Format specification of the value."""
    better: Literal["lower", "higher"] | None = None
    """Which values are better; None if neither is."""
    counted_on: str = ""
    """Name of the metric that gives the number of tokens behind the value, if the value means
    little without it."""
    headline: bool = False
    """True to show the metric in the tiles of the run page and in `stage=status`."""

    def number(self, value: object) -> str:
        """Format a value, without its unit."""
        finite = isinstance(value, int | float) and math.isfinite(value)
        return format(value, self.format) if finite else value_text(value)

    def text(self, value: object) -> str:
        """Format a value with its unit."""
        return f"{self.number(value)} {self.unit}".rstrip()

    def basis(self, evaluated: Mapping[str, Any]) -> str:
        """Return the number of tokens behind the value in words, or an empty string.

        Args:
            evaluated: Contents of `eval/metrics.json`.
        """
        tokens = evaluated.get(self.counted_on)
        return f"on {tokens:,} sampled tokens" if isinstance(tokens, int) else ""


class MetricRow(NamedTuple):
    """One line of a table of metrics."""

    name: str
    value: str | None
    """Formatted value; None if the metric was not measured."""
    unit: str
    definition: str
    better: str
    """`lower`, `higher`, or empty."""

    @property
    def text(self) -> str:
        """The value with its unit, or a dash if it was not measured."""
        return "–" if self.value is None else f"{self.value} {self.unit}".rstrip()


def definitions() -> dict[str, str]:
    """Return the definition of every metric, by name."""
    return {name: metric.definition for name, metric in METRICS.items()}


def metric_rows(evaluated: Mapping[str, Any]) -> list[MetricRow]:
    """Return the lines of a table of metrics.

    Args:
        evaluated: Contents of `eval/metrics.json`. Metrics that are defined there but not
            registered in this process come last.
    """
    defined = evaluated.get("definitions", {})
    metrics = dict(METRICS.items())
    for name in defined:
        metrics.setdefault(name, _UNREGISTERED)
    rows = []
    for name, metric in metrics.items():
        value = evaluated.get(name)
        text = None if value is None else metric.number(value)
        definition = str(defined.get(name, ""))
        rows.append(MetricRow(name, text, metric.unit, definition, metric.better or ""))
    return rows


def _dead_fraction(measured: Measured) -> float | None:
    if not measured.n_stored_rows:
        return None
    return float((measured.firing_counts == 0).double().mean())


FVU = Metric(
    title="FVU",
    definition="fraction of variance unexplained: sum |x - recon|^2 / sum |x - mean|^2 in raw "
    "activation units, where mean is the mean of the same rows; counts the rows that a store keeps "
    "(not position 0, no rows above data.max_norm_multiple, and no special tokens if "
    "data.drop_special_tokens is set)",
    value=lambda measured: measured[ReconstructionSums].fvu,
    accumulator=ReconstructionSums,
    better="lower",
    headline=True,
)
FVU_MEDIAN = Metric(
    title="FVU, median row",
    definition="median over the same rows of |x - recon|^2 / |x - typical|^2, where typical is the "
    "median of each dimension over stored training rows; a few rows of huge norm do not change it",
    value=lambda measured: measured[ReconstructionSums].fvu_median,
    accumulator=ReconstructionSums,
    better="lower",
)
VARIANCE_TOP_1 = Metric(
    title="Variance of 1%",
    definition="share of sum |x - typical|^2 that comes from the 1% of these rows with the "
    "largest terms; if it is large, fvu mostly measures how well those rows are "
    "reconstructed",
    value=lambda measured: measured[ReconstructionSums].top_share,
    accumulator=ReconstructionSums,
    unit="of the variance",
    format=".1%",
)
MSE = Metric(
    title="MSE",
    definition="mean of (x - recon)^2 over the same rows and all dimensions, in raw activation "
    "units",
    value=lambda measured: measured[ReconstructionSums].mse,
    accumulator=ReconstructionSums,
    better="lower",
)
L0 = Metric(
    title="L0",
    definition="mean number of latents above 0 per row, over the same rows",
    value=lambda measured: measured[ReconstructionSums].l0,
    accumulator=ReconstructionSums,
    unit="latents per token",
    format=".2f",
    headline=True,
)
DEAD_FRACTION = Metric(
    title="Dead",
    definition="fraction of latents that are above 0 on none of frequency_tokens training rows, a "
    "random sample of those stored at store.path (with cluster.retention=consumed: of the rows not "
    "yet deleted); a latent that fires less than about once in frequency_tokens tokens may count "
    "as dead",
    value=_dead_fraction,
    unit="of all latents",
    format=".2%",
    better="lower",
    counted_on="frequency_tokens",
    headline=True,
)
FREQUENCY_TOKENS = Metric(
    title="Sampled",
    definition="number of stored training rows on which the firings of dead_fraction and "
    "eval/frequency.json were counted (eval.frequency_tokens)",
    value=lambda measured: measured.n_stored_rows,
    unit="tokens",
    format=",",
)
DEAD_IN_TRAINING = Metric(
    title="Dead in training",
    definition="fraction of latents that fired on none of the last sae.dead_after_tokens training "
    "tokens before the checkpoint, counted by training itself while weights changed; null if "
    "training was shorter or the SAE is not from a checkpoint",
    value=lambda measured: measured.dead_in_training,
    unit="of all latents",
    format=".2%",
    better="lower",
)
CE_CLEAN = Metric(
    title="CE clean",
    definition="next-token cross-entropy of the unmodified model in nats, over predictions from "
    "position 1 on",
    value=lambda measured: measured[PredictionSums].cross_entropy(CLEAN),
    accumulator=PredictionSums,
    unit="nats",
    format=".3f",
)
CE_RECON = Metric(
    title="CE spliced",
    definition="cross-entropy over the same predictions with reconstructions spliced in for the "
    "rows that a store keeps; all other positions keep the activations of the unmodified model",
    value=lambda measured: measured[PredictionSums].cross_entropy(RECON),
    accumulator=PredictionSums,
    unit="nats",
    format=".3f",
    better="lower",
)
CE_ZERO = Metric(
    title="CE zero-ablated",
    definition="cross-entropy with zeros spliced in for the same rows",
    value=lambda measured: measured[PredictionSums].cross_entropy(ZERO),
    accumulator=PredictionSums,
    unit="nats",
    format=".3f",
)
CE_MEAN = Metric(
    title="CE mean-ablated",
    definition="cross-entropy with the mean of the sampled training rows (frequency_tokens of "
    "those stored at store.path) spliced in for the same rows",
    value=lambda measured: measured[PredictionSums].cross_entropy(MEAN),
    accumulator=PredictionSums,
    unit="nats",
    format=".3f",
)
CE_RECOVERED = Metric(
    title="CE recovered",
    definition="(ce_zero - ce_recon) / (ce_zero - ce_clean); flattering where zeros are far from "
    "all activations, so read ce_recovered_mean and kl first",
    value=lambda measured: measured[PredictionSums].recovered(ZERO),
    accumulator=PredictionSums,
    unit="of zero ablation",
    format=".2%",
    better="higher",
    headline=True,
)
CE_RECOVERED_MEAN = Metric(
    title="CE recovered",
    definition="(ce_mean - ce_recon) / (ce_mean - ce_clean)",
    value=lambda measured: measured[PredictionSums].recovered(MEAN),
    accumulator=PredictionSums,
    unit="of mean ablation",
    format=".2%",
    better="higher",
    headline=True,
)
KL = Metric(
    title="KL",
    definition="mean over predictions of KL(clean || recon), in nats",
    value=lambda measured: measured[PredictionSums].kl,
    accumulator=PredictionSums,
    unit="nats per token",
    better="lower",
    headline=True,
)
TOKENS = Metric(
    title="Evaluated",
    definition="number of tokens evaluated, including BOS; without held-out text, the number of "
    "sampled stored rows",
    value=lambda measured: measured.n_tokens,
    unit="tokens",
    format=",",
)

_UNREGISTERED = Metric(title="", definition="", value=lambda measured: None)
"""Formats the values of metrics that are not registered in this process."""
_HERE = "analysis.evaluation.metrics"
METRICS: Registry[Metric] = Registry(
    "metric",
    "eval.metrics",
    "metrics",
    {
        "fvu": f"{_HERE}:FVU",
        "fvu_median": f"{_HERE}:FVU_MEDIAN",
        "variance_top_1": f"{_HERE}:VARIANCE_TOP_1",
        "mse": f"{_HERE}:MSE",
        "l0": f"{_HERE}:L0",
        "dead_fraction": f"{_HERE}:DEAD_FRACTION",
        "frequency_tokens": f"{_HERE}:FREQUENCY_TOKENS",
        "dead_in_training": f"{_HERE}:DEAD_IN_TRAINING",
        "ce_clean": f"{_HERE}:CE_CLEAN",
        "ce_recon": f"{_HERE}:CE_RECON",
        "ce_zero": f"{_HERE}:CE_ZERO",
        "ce_mean": f"{_HERE}:CE_MEAN",
        "ce_recovered_mean": f"{_HERE}:CE_RECOVERED_MEAN",
        "ce_recovered": f"{_HERE}:CE_RECOVERED",
        "kl": f"{_HERE}:KL",
        "tokens": f"{_HERE}:TOKENS",
    },
)
