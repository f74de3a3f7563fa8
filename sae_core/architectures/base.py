"""The training interface of an architecture: what the trainer needs from every SAE.

Shape legend: B batch rows of this replica, D d_model, L latents, l latents of this shard.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import NamedTuple, cast

import torch
import torch.distributed as dist
from torch import nn

from sae_core.architectures.dictionary_init import random_unit_rows
from sae_core.architectures.settings import SAEConfig
from sae_core.distributed.mesh import Mesh
from sae_core.kernels import Kernels, SparseGradient


class StepOutput(NamedTuple):
    """The loss of one step and its metrics. All tensors except `loss` are detached."""

    loss: torch.Tensor
    """Scalar. Its mean over data replicas is the loss of the global batch."""
    squared_error: torch.Tensor
    """Scalar: squared error on normalised inputs, summed over this replica's rows and over D."""
    fired: torch.Tensor
    """[l] bool: local latents that fired on any row of this replica's batch."""
    n_active: torch.Tensor
    """Scalar: number of active (row, latent) pairs on this rank."""
    metrics: Mapping[str, torch.Tensor]
    """Scalar values of the architecture's own metrics (`Architecture.metrics`), keyed by name."""
    input_total: torch.Tensor
    """[D]: sum of this replica's normalised rows."""
    input_square: torch.Tensor
    """Scalar: sum of squares of this replica's normalised rows."""


class SparseAutoencoder(nn.Module, ABC):
    """One rank's shard of an SAE in training, with l of its L dictionary rows.

    A subclass implements `forward` and `reconstruct_centred`, and `send_gradient_to` if its
    settings have `sparse_gradient`. It may add parameters. Those with one row per latent must be
    registered with `add_rows` and are split over the shards. All others are registered as usual and
    are the same on all ranks. All parameters and persistent buffers go into checkpoints.

    Args:
        config: Sizes and coefficients.
        d_model: Width D of the activations.
        mesh: This rank's position; dictionary rows are split over its latent group.
        kernels: Implementation of the sparse operations.
        seed: Seed of the initial dictionary, which does not depend on the number of shards.
    """

    unit_rows: tuple[str, ...] = ("W_dec",)
    """Parameters whose rows are scaled to unit norm after every update. The fused update always
    scales `W_dec`, and no other parameter."""

    def __init__(
        self, config: SAEConfig, d_model: int, mesh: Mesh, kernels: Kernels, seed: int
    ) -> None:
        super().__init__()
        self.config = config
        self.d_model = d_model
        self.mesh = mesh
        self.kernels = kernels
        self.first_latent, stop = mesh.rows(config.n_latents)
        """Global index of the first local latent."""
        self.latent_group = mesh.latent_group if mesh.n_latent > 1 else None
        """The ranks that share the dictionary; None if the dictionary is not sharded."""
        self.row_names: set[str] = {"tokens_since_fired"}
        """Names of the parameters and buffers with one row per latent, split over the shards."""

        n_rows = stop - self.first_latent
        W_dec = random_unit_rows(self.first_latent, stop, d_model, seed)
        # Encoder and decoder are tied at initialisation, which keeps latents alive.
        self.W_enc = self.add_rows("W_enc", W_dec.clone())
        self.b_enc = self.add_rows("b_enc", torch.zeros(n_rows))
        self.W_dec = self.add_rows("W_dec", W_dec)
        self.b_dec = nn.Parameter(torch.zeros(d_model))
        self.input_center: torch.Tensor
        self.input_mean: torch.Tensor
        self.input_scale: torch.Tensor
        self.tokens_since_fired: torch.Tensor
        self.input_map: torch.Tensor | None
        """[D] factors, or a symmetric [D, D] matrix, of the raw activations minus `input_center`.
        None if `sae.input_transform` has none."""
        shape = config.map_shape(d_model)
        self.register_buffer("input_map", None if shape is None else torch.zeros(shape))
        self.register_buffer("input_center", None if shape is None else torch.zeros(d_model))
        self.register_buffer("input_mean", torch.zeros(d_model))
        self.register_buffer("input_scale", torch.ones(()))
        self.register_buffer("tokens_since_fired", torch.zeros(n_rows, dtype=torch.int64))

        self.W_enc_copy: torch.Tensor | None
        self.W_dec_copy: torch.Tensor | None
        for name in ("W_enc", "W_dec"):
            copy = None
            if kernels.copy_dtype is not None:
                copy = getattr(self, name).detach().to(kernels.copy_dtype)
            self.register_buffer(f"{name}_copy", copy, persistent=False)

    def add_rows(self, name: str, rows: torch.Tensor) -> nn.Parameter:
        """Register and return a parameter with one row per local latent, [l, ...] float32."""
        parameter = nn.Parameter(rows)
        # Marks the parameter as a shard. Otherwise DeepSpeed would leave other shards out of norms.
        cast("_Sharded", parameter).tensor_model_parallel = True
        self.register_parameter(name, parameter)
        self.row_names.add(name)
        return parameter

    def begin_step(self, tokens: int) -> None:
        """Prepare for a step; called on the host before each one. The default does nothing.

        Schedules belong here: as functions of `tokens`, they need no state in checkpoints. Steps
        that run as a CUDA graph do not see changes of Python values.

        Args:
            tokens: Training tokens before this step.
        """

    def after_update(self, out: StepOutput, skipped: torch.Tensor) -> None:
        """Change state after the update of a step. The default does nothing.

        Args:
            out: Output of the step.
            skipped: Scalar: 1 if the update was skipped, in which case nothing may change.
        """

    def resample(self, skipped: torch.Tensor) -> torch.Tensor | None:
        """Replace the rows of some latents after the update of a step; collective over all ranks.

        The engine then sets Adam's moments of these rows to 0, in all parameters that have one row
        per latent.

        Args:
            skipped: Scalar: 1 if the update was skipped, in which case nothing may change.

        Returns:
            [l] bool, the latents that were replaced; None in a step without resampling, which all
            ranks must agree on. The default is None.
        """
        return None

    def weights_replaced(self) -> None:
        """Update state after other code has replaced weights and vectors; the default does nothing.

        `train.init_from` calls this.
        """

    @abstractmethod
    def forward(self, raw: torch.Tensor) -> StepOutput:
        """Compute the loss on this replica's rows; collective over the latent and data groups.

        Args:
            raw: [B, D] raw activations, the same on all ranks of the latent group.
        """

    @abstractmethod
    def reconstruct_centred(self, centred: torch.Tensor) -> torch.Tensor:
        """Return the reconstruction of centred inputs from all shards, without `b_dec`.

        Collective over the latent group; needs no gradient.

        Args:
            centred: [N, D] normalised inputs minus `b_dec`, the same on all ranks of the group.

        Returns:
            [N, D], the same on all ranks of the group.
        """

    def send_gradient_to(self, receive: Callable[[SparseGradient], None]) -> None:
        """Send all further gradients of W_enc, b_enc and W_dec to `receive` instead of to autograd.

        Each backward pass calls `receive` once. The fused optimiser uses this.
        """
        raise NotImplementedError(f"{type(self).__name__} has no sparse gradient")

    @torch.no_grad()
    def calibrate_encoder(self, x: torch.Tensor) -> None:
        """Initialise the encoder from a sample, once `b_dec` is set; collective over all ranks.

        Scales W_enc so that the squared error of the reconstructions is as small as possible.
        Scaled to the norm of the inputs instead, as in Gao et al., a random dictionary starts with
        an FVU near 1, because its reconstructions hardly correlate with their inputs.

        Args:
            x: [N, D] normalised rows, the same on all ranks.
        """
        centred = x - self.b_dec
        recon = self.reconstruct_centred(centred)
        power = recon.square().sum()
        # Without b_enc, reconstructions are proportional to W_enc. If all are 0, it stays as it is.
        scale = torch.where(power > 0, (centred * recon).sum() / power.clamp_min(1e-30), 1.0)
        # All ranks use rank 0's value: rounding differences would otherwise make replicas diverge.
        dist.broadcast(scale, src=0)
        self.scale_encoder(scale)

    @torch.no_grad()
    def scale_encoder(self, scale: torch.Tensor) -> None:
        """Multiply pre-activations by a scalar before training, when `b_enc` is still 0.

        A subclass also scales its thresholds.
        """
        self.W_enc.mul_(scale)

    @property
    def copies(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """W_enc and W_dec in `Kernels.copy_dtype`; None if the kernels use no copies."""
        if self.W_enc_copy is None or self.W_dec_copy is None:
            return None
        return self.W_enc_copy, self.W_dec_copy

    @torch.no_grad()
    def refresh_copies(self) -> None:
        """Update the copies after other code has changed the master weights."""
        if self.copies is not None:
            for copy, master in zip(self.copies, (self.W_enc, self.W_dec), strict=True):
                copy.copy_(master)

    def normalise(self, raw: torch.Tensor) -> torch.Tensor:
        """Normalise raw activations [B, D] of any float dtype to float32 with unit mean square."""
        return (self.mapped(raw).float() - self.input_mean) * self.input_scale

    def mapped(self, raw: torch.Tensor) -> torch.Tensor:
        """Apply `sae.input_transform`, without centring and scale, to raw activations [N, D].

        Returns:
            [N, D]: `raw` itself if there is no map, otherwise float32.
        """
        if self.input_map is None:
            return raw
        centred = raw.float() - self.input_center
        return centred * self.input_map if self.input_map.ndim == 1 else centred @ self.input_map

    def dead(self) -> torch.Tensor:
        """Return the local latents that have not fired for `dead_after_tokens` tokens, [l] bool."""
        after = self.config.dead_after_tokens
        assert after is not None, "the settings of an SAE in training are resolved"
        return self.tokens_since_fired >= after

    @torch.no_grad()
    def update_tokens_since_fired(
        self, fired: torch.Tensor, batch_tokens: int, skipped: torch.Tensor
    ) -> None:
        """Update `tokens_since_fired` after one global batch; collective over the data group.

        Args:
            fired: [l] bool, latents that fired on this replica.
            batch_tokens: Number of tokens in the global batch.
            skipped: Scalar: 1 if the update was skipped, in which case nothing changes.
        """
        anywhere = fired.to(torch.uint8)
        if self.mesh.n_data > 1:
            dist.all_reduce(anywhere, op=dist.ReduceOp.MAX, group=self.mesh.data_group)
        aged = torch.where(anywhere > 0, 0, self.tokens_since_fired + batch_tokens)
        self.tokens_since_fired.copy_(torch.where(skipped > 0, self.tokens_since_fired, aged))


class _Sharded(nn.Parameter):
    """Type of a parameter with DeepSpeed's mark for shards."""

    tensor_model_parallel: bool
