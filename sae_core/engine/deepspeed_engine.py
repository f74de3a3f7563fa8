"""One SAE trained with DeepSpeed: the engine, the step, and the optimiser state at any ZeRO stage.

All uses of DeepSpeed that are not public API are in this file; `tests/distributed` fails if one of
them changes.
"""

from __future__ import annotations

import collections
import logging
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from foundation.errors import ConfigError
from sae_core.architectures.base import SparseAutoencoder, StepOutput
from sae_core.config import TrainerConfig
from sae_core.distributed.mesh import MeshMPU
from sae_core.engine.adam import ShardedAdam
from sae_core.engine.fused_adam import FusedRowAdam
from sae_core.engine.lr_schedule import lr_at
from sae_core.engine.step_graph import StepGraph
from sae_core.kernels.stock.update import renormalise_

MOMENTS = ("exp_avg", "exp_avg_sq")
"""Adam's two moments, by torch's names."""


class SAEEngine:
    """A shard of an SAE with its optimiser; `train_step` is collective over all ranks.

    Args:
        name: Key of this SAE in metrics and checkpoints.
        sae: This rank's shard, calibrated or about to be loaded from a checkpoint.
        config: Config of the optimiser, batch and mesh.
        device: Device of the parameters.
    """

    def __init__(
        self, name: str, sae: SparseAutoencoder, config: TrainerConfig, device: torch.device
    ) -> None:
        self.name = name
        self.config = config
        self.device = device
        self.sae = sae.to(device)
        zero = config.parallel.zero_stage
        clip_norm = config.optim.clip_norm
        self.fused = config.fused
        if self.fused and tuple(sae.unit_rows) != ("W_dec",):
            raise ConfigError(
                "optim.update",
                config.optim.update,
                f"dense: the fused update scales the rows of W_dec and of no other parameter to "
                f"unit norm, but the parameters with unit rows of "
                f"sae.architecture={config.sae.architecture!r} are {sae.unit_rows}",
            )
        optimizer_class = FusedRowAdam if self.fused else ShardedAdam
        self.optimizer = optimizer_class(
            sae,
            lr_at(config.optim, config.sae.n_latents, 0, config.train.tokens),
            config.optim,
            clip_norm if zero == 0 else None,
        )
        self.engine = _initialise_deepspeed(sae, self.optimizer, config, clip_norm if zero else 0.0)
        # -1 until the loss or gradient norm of a step is not finite, then the index of that step.
        self.first_bad_step = torch.full((), -1, dtype=torch.int64, device=device)
        self._step_index = torch.zeros((), dtype=torch.int64, device=device)
        self._lr: torch.Tensor | None = None
        if sae.kernels.asynchronous:
            # On the device, so that it can change between two replays of a graph.
            self._lr = torch.zeros((), device=device)
            for group in self.engine.optimizer.param_groups:
                group["lr"] = self._lr
                group["capturable"] = device.type == "cuda"
        self._run_step: Callable[[torch.Tensor], StepOutput] = self._step_on_device
        # None if steps do not run as a CUDA graph.
        self.step_graph: StepGraph | None = None
        if self._can_capture():
            self.step_graph = StepGraph(
                self._step_on_device, self.optimizer.discard_gradient, device
            )
            self._run_step = self.step_graph

    def _can_capture(self) -> bool:
        """Return True if steps run as a CUDA graph.

        With several ranks, a graph would contain collectives; this has not been tried.
        """
        return (
            self.config.train.cuda_graph == "auto"
            and self.device.type == "cuda"
            and self.sae.kernels.asynchronous
            and self.fused
            and dist.get_world_size() == 1
        )

    def train_step(self, raw: torch.Tensor, step: int) -> StepOutput:
        """Run one step: forward, backward, clip, update, renormalise, age `tokens_since_fired`.

        The host does not wait for the device here, except under ZeRO 1, with the dense update, and
        with kernels that are not asynchronous.

        If the loss on any rank or the gradient norm is not finite, this update and all later ones
        are skipped, and `first_bad_step` is set to the index of the step.

        Args:
            raw: [B / n_data, D] raw rows of this replica on `device`.
            step: Index of this optimiser step.

        Returns:
            The loss and metrics of this replica. The next call may overwrite these tensors.
        """
        tokens = step * self.config.train.batch_tokens
        self.sae.begin_step(tokens)
        lr = lr_at(self.config.optim, self.config.sae.n_latents, tokens, self.config.train.tokens)
        lr *= self.config.sae.lr_share(tokens)
        if self._lr is not None:
            self._lr.fill_(lr)
        else:
            for group in self.engine.optimizer.param_groups:
                group["lr"] = lr
        self._step_index.fill_(step)
        return self._run_step(raw)

    def _step_on_device(self, raw: torch.Tensor) -> StepOutput:
        """Run a step with the learning rate and the index that are on the device."""
        out: StepOutput = self.engine(raw)
        flag = (~out.loss.detach().isfinite()).float()
        if dist.get_world_size() > 1:
            dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        self._mark_bad(flag)
        self.engine.backward(out.loss)
        self.engine.step()
        if self.config.parallel.zero_stage:
            # ZeRO silently skips an update whose gradient norm is not finite; record it here.
            flag = (~self.grad_norm.isfinite()).float()
            self._mark_bad(flag)
        bad = self.optimizer.found_inf
        first = (bad > 0) & (self.first_bad_step < 0)
        self.first_bad_step.copy_(torch.where(first, self._step_index, self.first_bad_step))
        if not self.fused:
            for name in self.sae.unit_rows:
                parameter = self.sae.get_parameter(name)
                renormalise_(parameter, bad)
                self._push_to_zero(parameter)
            self.sae.refresh_copies()
        self.sae.update_tokens_since_fired(out.fired, self.config.train.batch_tokens, bad)
        self.sae.after_update(out, bad)
        replaced = self.sae.resample(bad)
        if replaced is not None:
            self._forget_rows(replaced)
            self.sync_edited_parameters()
        return out

    def _mark_bad(self, flag: torch.Tensor) -> None:
        """Skip this update and all later ones if the flag is 1."""
        found_inf = self.optimizer.found_inf
        torch.maximum(found_inf, flag, out=found_inf)

    @torch.no_grad()
    def _forget_rows(self, latents: torch.Tensor) -> None:
        """Set Adam's moments of some latents' rows to 0; collective under ZeRO 1.

        Args:
            latents: [l] bool.
        """
        self._allocate_state()
        for name, parameter in self.sae.named_parameters():
            if name not in self.sae.row_names:
                continue
            for moment in MOMENTS:
                value = self._get_moment(parameter, moment)
                value[latents] = 0.0
                self._set_moment(parameter, moment, value)

    def sync_edited_parameters(self) -> None:
        """Update copies of the parameters after other code has changed the parameters in place."""
        for parameter in self.sae.parameters():
            self._push_to_zero(parameter)
        self.sae.refresh_copies()

    def _push_to_zero(self, parameter: torch.nn.Parameter) -> None:
        """Copy a changed parameter to the ZeRO 1 optimiser, which would otherwise overwrite it."""
        mapping = getattr(parameter, "_hp_mapping", None)
        if mapping is not None:
            mapping.update_hp()

    @property
    def grad_norm(self) -> torch.Tensor:
        """Global gradient norm of the last step, before clipping."""
        norm = self.engine.get_global_grad_norm()
        return torch.as_tensor(0.0 if norm is None else norm, device=self.device)

    @property
    def lr(self) -> float:
        """Learning rate of the last step."""
        return float(self.engine.optimizer.param_groups[0]["lr"])

    def moments(self) -> dict[str, dict[str, torch.Tensor]]:
        """Return Adam's moments of all parameters, for all local rows; collective under ZeRO 1.

        Returns:
            `{parameter: {moment: tensor}}`; each tensor has its parameter's shape.
        """
        return {name: self.moments_of(name) for name in self.parameter_names}

    @property
    def parameter_names(self) -> list[str]:
        """Names of the parameters, in the same order on all ranks."""
        return [name for name, _ in self.sae.named_parameters()]

    def moments_of(self, name: str) -> dict[str, torch.Tensor]:
        """Return Adam's moments of one parameter, for all local rows; collective under ZeRO 1."""
        self._allocate_state()
        parameter = self.sae.get_parameter(name)
        return {moment: self._get_moment(parameter, moment) for moment in MOMENTS}

    def moment_dtype(self, name: str) -> torch.dtype:
        """Return the dtype of the moments that `moments_of` returns for a parameter."""
        return self.optimizer.moment_dtype(self.sae.get_parameter(name))

    @torch.no_grad()
    def load(
        self,
        parameters: dict[str, torch.Tensor],
        moments: dict[str, dict[str, torch.Tensor]],
        step: int,
    ) -> None:
        """Load this rank's rows and moments from a checkpoint; collective under ZeRO 1.

        Args:
            parameters: `{name: tensor}`; each tensor has its parameter's shape.
            moments: Moments in the format of `moments()`.
            step: Number of optimiser steps taken.
        """
        self._allocate_state()
        for name, parameter in self.sae.named_parameters():
            parameter.copy_(parameters[name])
            self._push_to_zero(parameter)
            for moment in MOMENTS:
                self._set_moment(parameter, moment, moments[name][moment])
        self.sae.refresh_copies()
        for state in self.optimizer.state.values():
            state["step"].fill_(float(step))

    def _get_moment(self, parameter: torch.nn.Parameter, moment: str) -> torch.Tensor:
        if not self.config.parallel.zero_stage:
            return self.optimizer.state[parameter][moment]
        from deepspeed.utils import safe_get_full_optimizer_state

        full: torch.Tensor = safe_get_full_optimizer_state(parameter, moment)
        return full.view(parameter.shape)

    def _set_moment(self, parameter: torch.nn.Parameter, moment: str, value: torch.Tensor) -> None:
        if not self.config.parallel.zero_stage:
            self.optimizer.state[parameter][moment].copy_(value)
            return
        from deepspeed.utils import safe_set_full_optimizer_state

        safe_set_full_optimizer_state(parameter, value, moment)

    def _allocate_state(self) -> None:
        self.optimizer.allocate_state()
        if self.config.parallel.zero_stage:
            self.engine.optimizer._lazy_init_hp_params_optimizer_state()


def _initialise_deepspeed(
    sae: SparseAutoencoder, optimizer: ShardedAdam, config: TrainerConfig, clip_norm: float
) -> Any:
    """Create the DeepSpeed engine of an SAE; `clip_norm` is the norm ZeRO clips to, 0 for none."""
    device_type = next(sae.parameters()).device.type
    os.environ.setdefault("DS_ACCELERATOR", device_type)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    import deepspeed

    # Prevents DeepSpeed from compiling an unused op, which takes two minutes.
    deepspeed.ops.__compatible_ops__ = collections.defaultdict(bool)
    batch = config.train.batch_tokens // config.parallel.data
    engine, *_ = deepspeed.initialize(
        model=sae,
        model_parameters=list(sae.parameters()),
        optimizer=optimizer,
        mpu=MeshMPU(sae.mesh),
        dist_init_required=False,
        config={
            "train_micro_batch_size_per_gpu": batch,
            "gradient_clipping": clip_norm,
            "zero_optimization": {"stage": config.parallel.zero_stage},
            # ZeRO checks the exact type of the optimiser and does not know this subclass of Adam.
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 10**9,
            # On by default, and it synchronises the device twice a step.
            "timers": {"throughput": {"enabled": False}},
            "wall_clock_breakdown": False,
        },
    )
    if sae.mesh.n_data == 1 and config.parallel.zero_stage == 0:
        # With one replica there is nothing to reduce; this avoids a copy of every gradient.
        engine.enable_backward_allreduce = False
    return engine
