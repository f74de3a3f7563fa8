"""Data that an evaluation passes to accumulators, and its results."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar, cast

if TYPE_CHECKING:
    from torch import Tensor

    from sae_core.inference import SparseCoder

CLEAN, RECON, ZERO, MEAN = "clean", "recon", "zero", "mean"
"""Variants of the forward pass: the hookpoint's output is unmodified, reconstructed by the SAE,
replaced by zeros, or replaced by the mean of the stored training rows."""

NO_TARGET = -100
"""Target of a prediction that has none: of padding, or of the first token of another document.
torch's cross-entropy leaves it out."""


@dataclass(frozen=True)
class Rows:
    """A batch of the rows that the SAE is evaluated on, in raw activation units."""

    x: Tensor
    """[n, D] activations."""
    recon: Tensor
    """[n, D] reconstructions of `x`."""
    values: Tensor
    """[n, K] float32 values of the selected latents, in descending order; 0 means not active."""
    indices: Tensor
    """[n, K] int64 indices of the selected latents."""


@dataclass(frozen=True)
class Predictions:
    """The next-token predictions of one forward pass over a batch of held-out contexts."""

    variant: str
    """`clean`, `recon`, `zero` or `mean`. The variants of each batch are passed in this order."""
    logits: Tensor
    """[contexts, T - 2, vocabulary] logits of the predictions from position 1 on."""
    clean: Tensor
    """[contexts, T - 2, vocabulary] logits of the unmodified model for the same predictions."""
    targets: Tensor
    """[contexts, T - 2] int64 next tokens, or `NO_TARGET`."""


class Accumulator:
    """Sums from which metrics are computed; each evaluation has one instance of each class.

    A subclass overrides the methods for the data that it needs. The tensors of a call are on one
    device, and no gradients are recorded.

    Args:
        sae: The SAE that is evaluated.
    """

    def __init__(self, sae: SparseCoder) -> None: ...

    def start(self, typical: Tensor) -> None:
        """Receive the median of each dimension over stored rows, [D] float64, before all rows."""

    def add_rows(self, rows: Rows) -> None:
        """Add a batch of rows from held-out text, or of stored rows if there is no such text."""

    def add_predictions(self, predictions: Predictions) -> None:
        """Add a batch of predictions; called only if there is held-out text."""


A = TypeVar("A", bound=Accumulator)


@dataclass(frozen=True)
class Measured:
    """Results of an evaluation: the input of every metric.

    `measured[Kind]` returns the accumulator of class `Kind`, which a metric must have named.
    """

    accumulators: Mapping[type[Accumulator], Accumulator]
    firing_counts: Tensor
    """[L] int64: number of sampled training rows on which each latent is above 0."""
    n_stored_rows: int
    """Number of stored training rows in the sample (`eval.frequency_tokens`)."""
    n_tokens: int
    """Number of held-out tokens, including BOS, or `n_stored_rows` without held-out text."""
    dead_in_training: float | None = None
    """Fraction of latents that are dead according to training's own counter; None if unknown."""

    def __getitem__(self, kind: type[A]) -> A:
        return cast(A, self.accumulators[kind])
