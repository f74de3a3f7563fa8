"""Run a language model on held-out text with reconstructed activations spliced in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from analysis.evaluation.measurement import (
    CLEAN,
    MEAN,
    NO_TARGET,
    RECON,
    ZERO,
    Accumulator,
    Predictions,
    Rows,
)
from cluster.language_model.hooks import capture, splice
from cluster.language_model.packing import to_device

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from cluster.language_model.tokens.contexts import Split
    from sae_core.sharded_inference import ShardedSAE


class SplicedEvaluation:
    """Run held-out contexts four times: clean, reconstructed, zeroed and mean-ablated.

    The activations at the hookpoint do not depend on what is spliced in there. They are therefore
    computed first, in a forward pass that ends at the hookpoint, and reconstructed together for as
    many batches as the SAE takes at once. An SAE that is read from disk in shards is then read once
    for all of these batches.

    Only rows that a store would keep are replaced and measured, because the SAE was trained on no
    others: not position 0, for example, nor separators. All other positions keep their clean
    activations in all passes. The prediction at position 0 is therefore the same in all four, and
    accumulators receive only the predictions from position 1 on.

    Args:
        model: The language model.
        sae: The SAE to splice in.
        hookpoint: The tensor of the model that is replaced.
        mean: [D] vector that replaces every activation in the mean-ablated pass.
        accumulators: Accumulators that receive the rows and the predictions.
        predicts: False if the model has no language-model head. Then there are only rows.
        max_norm: Largest norm of the rows that a store keeps; None for no limit.
    """

    def __init__(
        self,
        model: nn.Module,
        sae: ShardedSAE,
        hookpoint: str,
        mean: Tensor,
        accumulators: Sequence[Accumulator],
        predicts: bool = True,
        max_norm: float | None = None,
    ) -> None:
        self._model = model
        self._sae = sae
        self._hookpoint = hookpoint
        self._mean = mean
        self._accumulators = accumulators
        self._predicts = predicts
        self._max_norm = max_norm
        self._device = next(model.parameters()).device
        self.n_rows = 0
        """Number of rows evaluated so far."""
        self.n_predictions = 0
        """Number of predictions so far that have a target."""

    @torch.inference_mode()
    def run(
        self,
        split: Split,
        contexts: NDArray[np.int64],
        batch_contexts: int,
        progress: Callable[[int], None] = lambda done: None,
    ) -> None:
        """Evaluate contexts in batches.

        Args:
            split: The text that the contexts belong to.
            contexts: Indices of the contexts.
            batch_contexts: Contexts per forward pass.
            progress: Called after each batch with the number of contexts evaluated so far.
        """
        batches = [
            contexts[start : start + batch_contexts]
            for start in range(0, len(contexts), batch_contexts)
        ]
        done = 0
        while batches:
            rows_per_batch = split.input_ids(batches[0])[:, 1:].size
            size = max(1, self._sae.plan.rows_at_once // rows_per_batch)
            group, batches = batches[:size], batches[size:]
            x = [self._activations(split, batch) for batch in group]
            for batch, rows in zip(group, self._reconstruct(x), strict=True):
                self._add_batch(split, batch, rows)
                done += len(batch)
                progress(done)

    def _activations(self, split: Split, batch: NDArray[np.int64]) -> Tensor:
        """Return the clean activations from position 1 on: [contexts, T - 1, D]."""
        captured = capture(self._model, [self._hookpoint], **self._inputs(split, batch))
        return captured[self._hookpoint][:, 1:].to(self._sae.rows_device)

    def _reconstruct(self, x: list[Tensor]) -> list[Rows]:
        """Encode and decode the activations of several batches, [contexts, T - 1, D] each.

        Returns:
            For each batch its `Rows`, with leading dimensions [contexts, T - 1].
        """
        flat = torch.cat([part.flatten(0, 1) for part in x]) if len(x) > 1 else x[0].flatten(0, 1)
        pieces = []
        # Only a single batch can have more rows than the SAE takes at once.
        for piece in flat.split(self._sae.plan.rows_at_once):
            values, indices = self._sae.encode_topk(piece)
            pieces.append((values, indices, self._sae.decode_topk(values, indices)))
        width = max(values.shape[1] for values, _, _ in pieces)
        values, indices = (
            torch.cat(
                [nn.functional.pad(piece[i], (0, width - piece[i].shape[1])) for piece in pieces]
            )
            for i in (0, 1)
        )
        recon = torch.cat([piece[2] for piece in pieces])
        sizes = [part.shape[0] * part.shape[1] for part in x]
        parts = zip(recon.split(sizes), values.split(sizes), indices.split(sizes), strict=True)
        return [
            Rows(own, *(part.view(*own.shape[:2], -1) for part in coded))
            for own, coded in zip(x, parts, strict=True)
        ]

    def _add_batch(self, split: Split, batch: NDArray[np.int64], rows: Rows) -> None:
        """Feed the accumulators with a batch's rows and with the predictions of its four passes."""
        inputs = self._inputs(split, batch)
        # Only the rows that a store would keep.
        kept = torch.from_numpy(split.kept(batch)).to(rows.x.device)
        if self._max_norm is not None:
            kept &= rows.x.double().norm(dim=-1) <= self._max_norm
        shown = Rows(rows.x[kept], rows.recon[kept], rows.values[kept], rows.indices[kept])
        self.n_rows += len(shown.x)
        for accumulator in self._accumulators:
            accumulator.add_rows(shown)
        if not self._predicts:
            return
        replacements: dict[str, Callable[[Tensor], Tensor]] = {
            RECON: rows.recon.to,
            ZERO: torch.zeros_like,
            MEAN: lambda x: self._mean.to(x).expand_as(x),
        }
        targets = inputs["input_ids"][:, 2:].clone()
        predicted = split.predicted(batch)
        if predicted is not None:
            targets[~torch.from_numpy(predicted).to(targets.device)] = NO_TARGET
        self.n_predictions += int((targets != NO_TARGET).sum())
        clean = self._run(inputs, lambda x: x)
        self._show(CLEAN, clean, clean, targets)
        for variant, replace in replacements.items():
            logits = self._run(inputs, _only_at(kept, replace))
            self._show(variant, logits, clean, targets)

    def _inputs(self, split: Split, batch: NDArray[np.int64]) -> dict[str, Tensor]:
        return to_device(split.model_inputs(batch), self._device)

    def _run(self, inputs: dict[str, Tensor], replace: Callable[[Tensor], Tensor]) -> Tensor:
        with splice(self._model, self._hookpoint, replace):
            logits: Tensor = self._model(**inputs, use_cache=False).logits
        # The prediction at position 0 is the same in all passes. The last position has no target.
        return logits[:, 1:-1]

    def _show(self, variant: str, logits: Tensor, clean: Tensor, targets: Tensor) -> None:
        predictions = Predictions(variant, logits, clean, targets)
        for accumulator in self._accumulators:
            accumulator.add_predictions(predictions)


def _only_at(kept: Tensor, replace: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Limit a replacement of [contexts, T - 1, D] to the positions in `kept`, [contexts, T - 1]."""
    return lambda x: torch.where(kept.to(x.device)[..., None], replace(x), x)
