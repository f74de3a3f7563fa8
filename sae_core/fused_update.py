"""Adam on dictionary rows straight from the sparse gradient: no dense [L, D] gradient ever exists.

The rows' parameters have no `.grad` and `requires_grad=False`, else the engine would make zero
gradients for them and reduce those. The backward hands over what the gradient is made of; `step`
brings the replicas' parts together and has the kernels update the rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from sae_core.config import OptimConfig
from sae_core.exchange import over_replicas
from sae_core.kernels import AdamStep, RowState, RowUpdate, SparseGradient
from sae_core.optimizer import ShardedAdam

if TYPE_CHECKING:
    from sae_core.architectures.topk import TopKSAE


class FusedRowAdam(ShardedAdam):
    """`ShardedAdam` whose dictionary rows come as `SparseGradient`s; ZeRO 0 only.

    Args:
        sae: its row-sharded parameters stop requiring gradients, and its plan hands theirs here.
        lr: learning rate of the first step.
        config: betas, eps, dtype of the moments.
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
        dtype = getattr(torch, config.moments)
        self._moment_dtypes: dict[torch.Tensor, torch.dtype] = {sae.W_enc: dtype, sae.W_dec: dtype}
        self._gradient: SparseGradient | None = None
        self._rows: RowUpdate | None = None

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of everything; decoder rows end with unit norm."""
        assert self._gradient is not None, "step without a backward"
        gradient, self._gradient = self._gradient, None
        if self.sae.mesh.n_data > 1:
            gradient = over_replicas(gradient, self.sae.mesh.data_group)
        self._rows = self.sae.plan.kernels.row_update(gradient, self.sae.W_dec)
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
        return self._rows.square()

    def _moment_dtype(self, parameter: torch.Tensor) -> torch.dtype:
        return self._moment_dtypes.get(parameter, parameter.dtype)

    def _update_rows(self, rows: RowUpdate) -> None:
        sae, options = self.sae, self.param_groups[0]
        step = self.state[sae.W_enc]["step"] + (1 - self.found_inf)
        parameters = (sae.W_enc, sae.W_dec, sae.b_enc)
        exp_avg, exp_avg_sq = (
            (self.state[sae.W_enc][key], self.state[sae.W_dec][key], self.state[sae.b_enc][key])
            for key in ("exp_avg", "exp_avg_sq")
        )
        state = RowState(*parameters, exp_avg, exp_avg_sq, sae.copies, sae.plan.first_latent)
        beta1, beta2 = options["betas"]
        adam = AdamStep(
            options["lr"], beta1, beta2, options["eps"], step, self.grad_scale, self.found_inf
        )
        rows.apply(state, adam)
        for parameter in parameters:
            self.state[parameter]["step"].copy_(step)
