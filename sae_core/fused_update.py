"""Adam on dictionary rows straight from the sparse gradient: no dense [L, D] gradient ever exists.

The rows' parameters have no `.grad` and `requires_grad=False`, else the engine would make zero
gradients for them and reduce those. The backward hands over what the gradient is made of; `step`
brings the replicas' parts together, sums per row, and walks over the dictionary in blocks that
stay in the cache: Adam on encoder and decoder rows, then unit norm, one pass over each array.
This is Adam, exactly: rows that were not used decay their moments and move with them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from sae_core.autoencode import SparseGradient, project
from sae_core.config import OptimConfig
from sae_core.exchange import over_replicas
from sae_core.kernels import RowGradients
from sae_core.optimizer import ShardedAdam, renormalise_

if TYPE_CHECKING:
    from sae_core.architectures.topk import TopKSAE

_BLOCK_BYTES = 2 << 20
"""Bytes of one array's rows that are worked on together; eight arrays take part."""


class FusedRowAdam(ShardedAdam):
    """`ShardedAdam` whose dictionary rows come as `SparseGradient`s; ZeRO 0 only.

    Args:
        sae: its row-sharded parameters stop requiring gradients, and its plan hands theirs here.
        lr: learning rate of the first step.
        config: betas, eps.
        clip_norm: largest global gradient norm, 0 for no limit; the norm is that of this step.
    """

    def __init__(
        self, sae: TopKSAE, lr: float, config: OptimConfig, clip_norm: float | None
    ) -> None:
        super().__init__(sae, lr, config, clip_norm)
        self.sae = sae
        for parameter in (sae.W_enc, sae.b_enc, sae.W_dec):
            parameter.requires_grad_(False)
        sae.plan = replace(sae.plan, collect=self._collect)
        self._gradient: SparseGradient | None = None
        self._rows: RowGradients | None = None
        d_model = sae.b_dec.shape[0]
        n = max(1, min(_BLOCK_BYTES // (4 * d_model), sae.W_enc.shape[0]))
        self._block = (torch.empty_like(sae.W_enc[:n]), torch.empty_like(sae.W_dec[:n]))
        self._block_bias = torch.empty_like(sae.b_enc[:n])

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of everything; decoder rows end with unit norm."""
        assert self._gradient is not None, "step without a backward"
        gradient, self._gradient = self._gradient, None
        if self.sae.mesh.n_data > 1:
            gradient = over_replicas(gradient, self.sae.mesh.data_group)
        rows = self.sae.plan.kernels.row_gradients(*gradient)
        self._rows = project(rows, self.sae.W_dec)
        result = super().step(closure)  # the norm and its consequences, then `b_dec`
        self.allocate_state()
        self._update_rows(self._rows)
        self._rows = None
        return result

    def _collect(self, gradient: SparseGradient) -> None:
        assert self._gradient is None, "two backwards before a step"
        self._gradient = gradient

    def _collected_square(self) -> torch.Tensor:
        assert self._rows is not None
        parts = [self._rows.W_enc, self._rows.W_dec, self._rows.b_enc]
        return torch.stack([part.norm().square() for part in parts]).sum()

    def _update_rows(self, rows: RowGradients) -> None:
        n_rows, size = self.sae.W_enc.shape[0], self._block_bias.shape[0]
        step = self.state[self.sae.W_enc]["step"] + (1 - self.found_inf)
        starts = list(range(0, n_rows, size))
        edges = torch.tensor([*starts, n_rows], device=rows.latents.device)
        cuts = torch.searchsorted(rows.latents, edges).tolist()
        for start, first, last in zip(starts, cuts[:-1], cuts[1:], strict=True):
            stop = min(start + size, n_rows)
            part = RowGradients(*(tensor[first:last] for tensor in rows))
            self._update_block(slice(start, stop), part, step)
        for parameter in (self.sae.W_enc, self.sae.b_enc, self.sae.W_dec):
            self.state[parameter]["step"].copy_(step)

    def _update_block(self, span: slice, rows: RowGradients, step: torch.Tensor) -> None:
        n = span.stop - span.start
        grads = [block[:n].zero_() for block in (*self._block, self._block_bias)]
        for grad, values in zip(grads, (rows.W_enc, rows.W_dec, rows.b_enc), strict=True):
            grad.index_copy_(0, rows.latents - span.start, values)
        parameters = (self.sae.W_enc, self.sae.W_dec, self.sae.b_enc)
        options = self.param_groups[0]
        torch._fused_adam_(
            [parameter[span] for parameter in parameters],
            grads,
            [self.state[parameter]["exp_avg"][span] for parameter in parameters],
            [self.state[parameter]["exp_avg_sq"][span] for parameter in parameters],
            [],
            [step] * len(parameters),
            lr=options["lr"],
            beta1=options["betas"][0],
            beta2=options["betas"][1],
            weight_decay=0.0,
            eps=options["eps"],
            amsgrad=False,
            maximize=False,
            grad_scale=self.grad_scale,
            found_inf=self.found_inf,
        )
        renormalise_(self.sae.W_dec[span], self.found_inf)
