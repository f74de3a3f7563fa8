"""Measure how much worse a language model's predictions get, using sums over predicted tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from analysis.evaluation.measurement import CLEAN, NO_TARGET, RECON, Accumulator, Predictions

if TYPE_CHECKING:
    from sae_core.inference import SparseCoder


class PredictionSums(Accumulator):
    """Sums for the cross-entropies and the KL divergence, in nats.

    B contexts of T tokens give B * (T - 2) predictions, less those without a target.
    """

    def __init__(self, sae: SparseCoder) -> None:
        super().__init__(sae)
        self._loss: dict[str, float] = {}
        self._kl = 0.0
        self._predictions = 0

    def add_predictions(self, predictions: Predictions) -> None:
        """Add the losses of one forward pass and, for `recon`, its divergence from `clean`."""
        variant, logits, targets = predictions.variant, predictions.logits, predictions.targets
        self._loss[variant] = self._loss.get(variant, 0.0) + _loss(logits, targets)
        if variant == CLEAN:
            self._predictions += int((targets != NO_TARGET).sum())
        if variant == RECON:
            self._kl += _divergence(predictions.clean, logits, targets)

    def cross_entropy(self, variant: str) -> float | None:
        """Return the mean cross-entropy of a variant, or None if nothing was predicted."""
        loss = self._loss.get(variant)
        return loss / self._predictions if loss is not None and self._predictions else None

    def recovered(self, ablated: str) -> float | None:
        """Return (ablated - recon) / (ablated - clean) of the cross-entropies.

        The result is None if nothing was predicted, or if the ablation changes nothing.
        """
        worst, recon, clean = map(self.cross_entropy, (ablated, RECON, CLEAN))
        if worst is None or recon is None or clean is None or worst == clean:
            return None
        return (worst - recon) / (worst - clean)

    @property
    def kl(self) -> float | None:
        """Mean of KL(clean || recon); None if nothing was predicted."""
        return self._kl / self._predictions if self._predictions else None


def _loss(logits: Tensor, targets: Tensor) -> float:
    # One context at a time: the float32 log-probabilities of a whole batch would be the largest
    # tensor of the evaluation.
    total = 0.0
    for context, wanted in zip(logits, targets, strict=True):
        loss = nn.functional.cross_entropy(
            context.float(), wanted, reduction="sum", ignore_index=NO_TARGET
        )
        total += float(loss)
    return total


def _divergence(clean: Tensor, other: Tensor, targets: Tensor) -> float:
    """Return the sum over predictions with a target of KL(clean || other), in nats."""
    total = 0.0
    for p, q, wanted in zip(clean, other, targets, strict=True):
        has_target = wanted != NO_TARGET
        log_p, log_q = (part[has_target].float().log_softmax(-1) for part in (p, q))
        # kl_div(input, target) is KL(target || input).
        total += float(nn.functional.kl_div(log_q, log_p, reduction="sum", log_target=True))
    return total
