"""Run a language model on held-out text with reconstructed activations spliced in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from analysis.evaluation.measurement import (
    CLEAN,
    MEAN,
    RECON,
    ZERO,
    Accumulator,
    Predictions,
    Rows,
)
from cluster.language_model.hooks import splice

if TYPE_CHECKING:
    from cluster.language_model.contexts import Split
    from sae_core import SAE


class SplicedEvaluation:
    """Run held-out contexts four times: clean, reconstructed, zeroed and mean-ablated.

    Position 0 is never spliced, so the model's prediction there is the same in all four passes.
    Accumulators therefore receive only the predictions from position 1 on, and only the rows that
    a store would keep.

    Args:
        model: The language model.
        sae: The SAE to splice in.
        hookpoint: The tensor of the model that is replaced.
        mean: [D] vector that replaces every activation in the mean-ablated pass.
        accumulators: Accumulators that receive the rows and the predictions.
    """

    def __init__(
        self,
        model: nn.Module,
        sae: SAE,
        hookpoint: str,
        mean: Tensor,
        accumulators: Sequence[Accumulator],
    ) -> None:
        self._model = model
        self._sae = sae
        self._hookpoint = hookpoint
        self._mean = mean
        self._accumulators = accumulators
        self.n_rows = 0
        """Number of rows evaluated so far."""

    @torch.inference_mode()
    def add(self, split: Split, contexts: NDArray[np.int64]) -> None:
        """Evaluate the contexts with these indices in four forward passes."""
        device = next(self._model.parameters()).device
        input_ids = torch.from_numpy(split.input_ids(contexts)).to(device)
        kept = torch.from_numpy(split.kept(contexts)).to(device)
        replacements: dict[str, Callable[[Tensor], Tensor]] = {
            RECON: lambda x: self._reconstruct(x, kept),
            ZERO: torch.zeros_like,
            MEAN: lambda x: self._mean.to(x).expand_as(x),
        }
        clean = self._run(input_ids, lambda x: x)
        self._show(CLEAN, clean, clean, input_ids)
        for variant, replace in replacements.items():
            self._show(variant, self._run(input_ids, replace), clean, input_ids)

    def _run(self, input_ids: Tensor, replace: Callable[[Tensor], Tensor]) -> Tensor:
        with splice(self._model, self._hookpoint, replace):
            logits: Tensor = self._model(input_ids=input_ids, use_cache=False).logits
        # The prediction at position 0 is the same in all passes. The last position has no target.
        return logits[:, 1:-1]

    def _show(self, variant: str, logits: Tensor, clean: Tensor, input_ids: Tensor) -> None:
        predictions = Predictions(variant, logits, clean, input_ids[:, 2:])
        for accumulator in self._accumulators:
            accumulator.add_predictions(predictions)

    def _reconstruct(self, x: Tensor, kept: Tensor) -> Tensor:
        """Return reconstructions [B, T-1, D]; feed the accumulators the rows a store would keep."""
        values, indices = self._sae.encode_topk(x)
        recon = self._sae.decode_topk(values, indices)
        rows = Rows(x[kept], recon[kept], values[kept], indices[kept])
        self.n_rows += len(rows.x)
        for accumulator in self._accumulators:
            accumulator.add_rows(rows)
        return recon
