"""Adam on dictionary rows directly from the sparse gradient, without a dense [L, D] gradient.

The parameters of the rows have `requires_grad=False` and no `.grad`; otherwise the engine would
create zero gradients for them and reduce those gradients. The backward pass gives the sparse
gradient to the optimiser. `step` exchanges it between replicas and lets the kernels update the
rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from sae_core.config import OptimConfig
from sae_core.distributed.replica_exchange import gather_over_replicas
from sae_core.engine.adam import ShardedAdam
from sae_core.kernels import AdamStep, RowState, RowUpdate, SparseGradient

if TYPE_CHECKING:
    from sae_core.architectures.base import SparseAutoencoder


class FusedRowAdam(ShardedAdam):
    """A `ShardedAdam` that updates dictionary rows from a `SparseGradient`; ZeRO 0 only.

    Args:
        sae: SAE with a sparse gradient. W_enc, b_enc and W_dec are set to not require gradients,
            and their sparse gradient is sent to this optimiser.
        lr: Learning rate of the first step.
        config: Betas, eps, dtype of the moments.
        clip_norm: Maximum global gradient norm; 0 means no limit.
    """

    def __init__(
        self, sae: SparseAutoencoder, lr: float, config: OptimConfig, clip_norm: float | None
    ) -> None:
        super().__init__(sae, lr, config, clip_norm)
        self.sae = sae
        for parameter in (sae.W_enc, sae.b_enc, sae.W_dec):
            parameter.requires_grad_(False)
        sae.send_gradient_to(self._collect)
        dtype = getattr(torch, config.moments)
        self._moment_dtypes: dict[torch.Tensor, torch.dtype] = {sae.W_enc: dtype, sae.W_dec: dtype}
        self._gradient: SparseGradient | None = None
        self._rows: RowUpdate | None = None

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters once, and scale the decoder rows to unit norm."""
        assert self._gradient is not None, "step without a backward pass"
        gradient, self._gradient = self._gradient, None
        if self.sae.mesh.n_data > 1:
            gradient = gather_over_replicas(gradient, self.sae.mesh.data_group)
        self._rows = self.sae.kernels.row_update(gradient, self.sae.W_dec)
        # Computes the norm, sets `grad_scale` and `found_inf`, and updates `b_dec`.
        result = super().step(closure)
        self.allocate_state()
        self._update_rows(self._rows)
        self._rows = None
        return result

    def _collect(self, gradient: SparseGradient) -> None:
        """Receive the sparse gradient of a backward pass; see `send_gradient_to` of the SAE."""
        assert self._gradient is None, "two backward passes without a step between them"
        self._gradient = gradient

    def _collected_square(self) -> torch.Tensor:
        assert self._rows is not None
        return self._rows.square()

    def _moment_dtype(self, parameter: torch.Tensor) -> torch.dtype:
        return self._moment_dtypes.get(parameter, parameter.dtype)

    def _update_rows(self, rows: RowUpdate) -> None:
        """Apply the row update with this step's options; count the step unless it is skipped."""
        sae = self.sae
        options = self.param_groups[0]
        step = self.state[sae.W_enc]["step"] + (1 - self.found_inf)
        parameters = (sae.W_enc, sae.W_dec, sae.b_enc)
        W_enc, W_dec, b_enc = (self.state[parameter] for parameter in parameters)
        exp_avg = (W_enc["exp_avg"], W_dec["exp_avg"], b_enc["exp_avg"])
        exp_avg_sq = (W_enc["exp_avg_sq"], W_dec["exp_avg_sq"], b_enc["exp_avg_sq"])
        state = RowState(*parameters, exp_avg, exp_avg_sq, sae.copies, sae.first_latent)
        beta1, beta2 = options["betas"]
        adam = AdamStep(
            options["lr"], beta1, beta2, options["eps"], step, self.grad_scale, self.found_inf
        )
        rows.apply(state, adam)
        for parameter in parameters:
            self.state[parameter]["step"].copy_(step)
