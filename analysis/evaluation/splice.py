"""Measure how much worse a language model predicts with reconstructed activations spliced in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from analysis.evaluation.reconstruction import ReconstructionSums
from cluster.language_model.hooks import splice

if TYPE_CHECKING:
    from cluster.language_model.contexts import Split
    from sae_core import SAE

VARIANTS = ("recon", "zero", "mean")


@dataclass
class SpliceSums:
    """Sums over predicted tokens; B contexts of T tokens give B * (T - 2) predictions."""

    loss: dict[str, float]
    """Variant (`clean`, `recon`, `zero` or `mean`) -> sum of cross-entropies in nats."""
    kl: float = 0.0
    """Sum of KL(clean || recon) in nats."""
    predictions: int = 0

    def metrics(self) -> dict[str, float | None]:
        """Return the mean losses and KL divergence in nats, and the fractions recovered."""
        ce = {name: loss / max(self.predictions, 1) for name, loss in self.loss.items()}
        return {
            **{f"ce_{name}": value for name, value in ce.items()},
            "ce_recovered": _recovered(ce["zero"], ce["recon"], ce["clean"]),
            "ce_recovered_mean": _recovered(ce["mean"], ce["recon"], ce["clean"]),
            "kl": self.kl / max(self.predictions, 1),
        }


class SplicedEvaluation:
    """Run held-out contexts four times: clean, reconstructed, zeroed and mean-ablated.

    Position 0 is never spliced, so the model's prediction there is the same in all four passes.
    Losses and divergence therefore count only the predictions from position 1 on.

    Args:
        model: The language model.
        sae: The SAE to splice in.
        hookpoint: The tensor of the model that is replaced.
        mean: [D], replaces every activation in the mean-ablated pass.
    """

    def __init__(self, model: nn.Module, sae: SAE, hookpoint: str, mean: Tensor) -> None:
        self._model = model
        self._sae = sae
        self._hookpoint = hookpoint
        self._mean = mean
        self.rows = ReconstructionSums(sae.d_model)
        self.losses = SpliceSums(dict.fromkeys(("clean", *VARIANTS), 0.0))

    @torch.inference_mode()
    def add(self, split: Split, contexts: NDArray[np.int64]) -> None:
        """Evaluate the contexts with these indices in four forward passes, and add to the sums."""
        device = next(self._model.parameters()).device
        input_ids = torch.from_numpy(split.input_ids(contexts)).to(device)
        kept = torch.from_numpy(split.kept(contexts)).to(device)
        clean = self._run(input_ids, lambda x: x)

        def recon(x: Tensor) -> Tensor:
            return self._reconstruct(x, kept)

        replacements: dict[str, Callable[[Tensor], Tensor]] = {
            "recon": recon,
            "zero": torch.zeros_like,
            "mean": lambda x: self._mean.to(x).expand_as(x),
        }
        self.losses.loss["clean"] += _loss(clean, input_ids)
        for name, replace in replacements.items():
            logits = self._run(input_ids, replace)
            self.losses.loss[name] += _loss(logits, input_ids)
            if name == "recon":
                self.losses.kl += _divergence(clean, logits)
        self.losses.predictions += input_ids[:, 2:].numel()

    def _run(self, input_ids: Tensor, replace: Callable[[Tensor], Tensor]) -> Tensor:
        with splice(self._model, self._hookpoint, replace):
            logits: Tensor = self._model(input_ids=input_ids, use_cache=False).logits
        # Position 0 predicts the same in all passes; the last position has no next token.
        return logits[:, 1:-1]

    def _reconstruct(self, x: Tensor, kept: Tensor) -> Tensor:
        """Return [B, T-1, D] reconstructions, and count the rows that a store would keep."""
        values, indices = self._sae.encode_topk(x)
        recon = self._sae.decode_topk(values, indices)
        self.rows.add_rows(x[kept])
        self.rows.add_reconstruction(x[kept], recon[kept], values[kept])
        return recon


def _loss(logits: Tensor, input_ids: Tensor) -> float:
    # One context at a time: the float32 log-probabilities of a whole batch would be the largest
    # tensor of the evaluation.
    total = 0.0
    for context, ids in zip(logits, input_ids, strict=True):
        total += float(nn.functional.cross_entropy(context.float(), ids[2:], reduction="sum"))
    return total


def _divergence(clean: Tensor, other: Tensor) -> float:
    """Return the sum over predictions of KL(clean || other), in nats."""
    total = 0.0
    for p, q in zip(clean, other, strict=True):
        log_p, log_q = p.float().log_softmax(-1), q.float().log_softmax(-1)
        # kl_div(input, target) is KL(target || input).
        total += float(nn.functional.kl_div(log_q, log_p, reduction="sum", log_target=True))
    return total


def _recovered(ablated: float, recon: float, clean: float) -> float | None:
    """Return (ablated - recon) / (ablated - clean), or None if ablation changes nothing."""
    return None if ablated == clean else (ablated - recon) / (ablated - clean)
