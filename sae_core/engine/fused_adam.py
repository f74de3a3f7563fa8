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
import torch.distributed as dist

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
        sae = self.sae
        if sae.mesh.n_data > 1:
            asynchronous = sae.kernels.asynchronous
            gradient = gather_over_replicas(gradient, sae.mesh.data_group, asynchronous)
        self._rows = sae.kernels.row_update(gradient, sae.W_dec)
        self._add_input_bias_gradient(self._rows)
        # Computes the norm, sets `grad_scale` and `found_inf`, and updates `b_dec`.
        result = super().step(closure)
        self.allocate_state()
        square = self._update_rows(self._rows)
        if self.clip_norm == 0:
            self._add_to_norm(square)
        self._rows = None
        return result

    def _add_input_bias_gradient(self, rows: RowUpdate) -> None:
        """Add the part of `b_dec`'s gradient that comes through the encoder, of all shards."""
        sae = self.sae
        through_encoder = rows.input_bias_gradient(sae.copies[0] if sae.copies else sae.W_enc)
        if self.latent_group is not None:
            dist.all_reduce(through_encoder, group=self.latent_group)
        assert sae.b_dec.grad is not None
        sae.b_dec.grad += through_encoder

    def _add_to_norm(self, square: torch.Tensor) -> None:
        """Complete the gradient norm without clipping, where the update itself computes it."""
        if self.latent_group is not None:
            dist.all_reduce(square, group=self.latent_group)
        self._record_norm((self._global_grad_norm.square() + square).sqrt())

    def discard_gradient(self) -> None:
        """Drop the gradient of a backward pass that no step follows."""
        super().discard_gradient()
        self._gradient = None

    def _collect(self, gradient: SparseGradient) -> None:
        """Receive the sparse gradient of a backward pass; see `send_gradient_to` of the SAE."""
        assert self._gradient is None, "two backward passes without a step between them"
        self._gradient = gradient

    def _collected_square(self) -> torch.Tensor:
        assert self._rows is not None
        # Without clipping, nothing needs the norm before the update, which computes it in passing.
        return self._rows.square() if self.clip_norm else super()._collected_square()

    def moment_dtype(self, parameter: torch.Tensor) -> torch.dtype:
        """See `ShardedAdam.moment_dtype`."""
        return self._moment_dtypes.get(parameter, parameter.dtype)

    def _update_rows(self, rows: RowUpdate) -> torch.Tensor:
        """Apply the row update with this step's options; count the step unless it is skipped.

        Returns:
            The squared norm of the rows' gradient.
        """
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
        square = rows.apply(state, adam)
        for parameter in parameters:
            self.state[parameter]["step"].copy_(step)
        return square
