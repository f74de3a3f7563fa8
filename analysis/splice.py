"""What the language model loses when its activations are replaced by their reconstructions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from analysis.reconstruction import ReconstructionSums
from cluster.models import splice

if TYPE_CHECKING:
    from cluster.contexts import Split
    from sae_core import SAE

VARIANTS = ("recon", "zero", "mean")


@dataclass
class SpliceSums:
    """Sums over predicted tokens; B contexts of T tokens give B * (T - 2) predictions."""

    loss: dict[str, float]
    kl: float = 0.0
    predictions: int = 0

    def metrics(self) -> dict[str, float | None]:
        """Mean losses in nats, the divergence, and the shares recovered."""
        ce = {name: loss / max(self.predictions, 1) for name, loss in self.loss.items()}
        return {
            **{f"ce_{name}": value for name, value in ce.items()},
            "ce_recovered": _recovered(ce["zero"], ce["recon"], ce["clean"]),
            "ce_recovered_mean": _recovered(ce["mean"], ce["recon"], ce["clean"]),
            "kl": self.kl / max(self.predictions, 1),
        }


class SplicedEvaluation:
    """Runs held-out contexts clean, reconstructed, zeroed and mean-ablated.

    Position 0 is never spliced, so what the model predicts there is the same in all four and is not
    counted: losses and divergence are over predictions from position 1 on.
    """

    def __init__(self, model: nn.Module, sae: SAE, hookpoint: str, mean: Tensor) -> None:
        """Args: mean: [D] what the mean ablation puts in place of every activation."""
        self._model, self._sae, self._hookpoint = model, sae, hookpoint
        self._mean = mean
        self.rows = ReconstructionSums(sae.d_model)
        self.losses = SpliceSums(dict.fromkeys(("clean", *VARIANTS), 0.0))

    @torch.inference_mode()
    def add(self, split: Split, contexts: NDArray[np.int64]) -> None:
        """Evaluates contexts of a split: four forward passes."""
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
        return logits[:, 1:-1]

    def _reconstruct(self, x: Tensor, kept: Tensor) -> Tensor:
        """[B, T-1, D] reconstructions; the rows that a store would keep are counted."""
        values, indices = self._sae.encode_topk(x)
        recon = self._sae.decode_topk(values, indices)
        self.rows.add_rows(x[kept])
        self.rows.add_reconstruction(x[kept], recon[kept], values[kept])
        return recon


def _loss(logits: Tensor, input_ids: Tensor) -> float:
    # A context at a time: float32 log-probabilities of a whole batch would be the largest tensor.
    total = 0.0
    for context, ids in zip(logits, input_ids, strict=True):
        total += float(nn.functional.cross_entropy(context.float(), ids[2:], reduction="sum"))
    return total


def _divergence(clean: Tensor, other: Tensor) -> float:
    """Sum over predictions of KL(clean || other), in nats."""
    total = 0.0
    for p, q in zip(clean, other, strict=True):
        log_p, log_q = p.float().log_softmax(-1), q.float().log_softmax(-1)
        total += float(nn.functional.kl_div(log_q, log_p, reduction="sum", log_target=True))
    return total


def _recovered(ablated: float, recon: float, clean: float) -> float | None:
    """(ablated - recon) / (ablated - clean); None where ablation changes nothing."""
    return None if ablated == clean else (ablated - recon) / (ablated - clean)
