"""Settings of the SAE, its optimiser, training, mesh and checkpoints.

This module does not import torch, so that a config can be validated quickly.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from foundation.errors import ConfigError
from sae_core.architectures.registry import check_settings
from sae_core.architectures.settings import SAEConfig
from sae_core.architectures.topk.settings import TopKConfig
from sae_core.kernels.prefilter_choice import check_prefilter
from sae_core.kernels.registry import KERNELS, default_kernels

__all__ = [
    "CheckpointConfig",
    "OptimConfig",
    "ParallelConfig",
    "SAEConfig",
    "TopKConfig",
    "TrainConfig",
    "TrainerConfig",
]


@dataclass
class OptimConfig:
    """Settings of Adam and its schedule: linear warm-up, constant rate, linear decay to zero."""

    lr: float | None = None
    """Peak learning rate; null: lr_at_16k / sqrt(n_latents / 2**14)."""
    lr_at_16k: float = 2e-4
    """Peak learning rate at 2**14 latents, used when `lr` is null. 2e-4 suits long training (Gao et
    al. 2024); short training needs a higher rate."""
    warmup_tokens: int = 0
    """Length of the linear warm-up, in tokens; 0 disables it."""
    decay_tokens: int = 0
    """Length of the final linear decay to zero, in tokens; 0 disables it."""
    beta1: float = 0.9
    """Adam's decay rate for the first moment."""
    beta2: float = 0.999
    """Adam's decay rate for the second moment."""
    eps: float = 6.25e-10
    """Adam's epsilon."""
    clip_norm: float = 1.0
    """Maximum global gradient norm; larger gradients are scaled down to it. 0 disables clipping."""
    update: str = "auto"
    """How dictionary rows are updated: fused, dense, or auto (fused if possible, else dense). The
    fused update works directly from the sparse gradient and never builds a dense gradient. It needs
    ZeRO 0 and an architecture with sparse gradients, such as topk."""
    moments: str = "float32"
    """Dtype of Adam's moments of both matrices: float32 (exact), or bfloat16 with stochastic
    rounding (half the bytes, unbiased; needs the fused update)."""

    def fused(self, zero_stage: int, sparse_gradient: bool) -> bool:
        """Return True if dictionary rows are updated without a dense gradient.

        Args:
            zero_stage: ZeRO stage (`parallel.zero_stage`).
            sparse_gradient: True if the architecture has a sparse gradient
                (`SAEConfig.sparse_gradient`).
        """
        possible = zero_stage == 0 and sparse_gradient
        return self.update == "fused" or (self.update == "auto" and possible)

    def validate(self, train_tokens: int, zero_stage: int, sparse_gradient: bool) -> None:
        """Validate all fields.

        Args:
            train_tokens: Total training tokens (`train.tokens`).
            zero_stage: ZeRO stage (`parallel.zero_stage`).
            sparse_gradient: True if the architecture has a sparse gradient
                (`SAEConfig.sparse_gradient`).

        Raises:
            ConfigError: If a value is out of range, or warm-up and decay together are longer than
                training, or `update` or `moments` is incompatible with the ZeRO stage or the
                architecture.
        """
        if self.lr is not None and self.lr <= 0:
            raise ConfigError("optim.lr", self.lr, "more than 0, or null for the 1/sqrt(n) rule")
        if self.lr_at_16k <= 0:
            raise ConfigError("optim.lr_at_16k", self.lr_at_16k, "more than 0")
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            if not 0 <= value < 1:
                raise ConfigError(f"optim.{name}", value, "a number in [0, 1)")
        if self.eps <= 0:
            raise ConfigError("optim.eps", self.eps, "more than 0")
        self._validate_update(zero_stage, sparse_gradient)
        if self.clip_norm < 0:
            raise ConfigError("optim.clip_norm", self.clip_norm, "0 (off) or more")
        if self.warmup_tokens < 0 or self.decay_tokens < 0:
            raise ConfigError(
                "optim.warmup_tokens, optim.decay_tokens",
                (self.warmup_tokens, self.decay_tokens),
                "0 or more",
            )
        if self.warmup_tokens + self.decay_tokens > train_tokens:
            raise ConfigError(
                "optim.warmup_tokens + optim.decay_tokens",
                self.warmup_tokens + self.decay_tokens,
                f"at most train.tokens={train_tokens}",
                "shorten the warm-up or the decay, or raise train.tokens",
            )

    def _validate_update(self, zero_stage: int, sparse_gradient: bool) -> None:
        if self.update not in ("auto", "fused", "dense"):
            raise ConfigError("optim.update", self.update, "auto, fused or dense")
        if self.update == "fused" and zero_stage:
            raise ConfigError(
                "optim.update",
                self.update,
                "dense or auto if parallel.zero_stage=1, because ZeRO flattens the rows that the "
                "fused update needs",
            )
        if self.update == "fused" and not sparse_gradient:
            raise ConfigError(
                "optim.update",
                self.update,
                "dense or auto, because this architecture gives no sparse gradient",
            )
        if self.moments not in ("float32", "bfloat16"):
            raise ConfigError("optim.moments", self.moments, "float32 or bfloat16")
        if self.moments != "float32" and not self.fused(zero_stage, sparse_gradient):
            raise ConfigError(
                "optim.moments",
                self.moments,
                "float32 with the dense update, which uses torch's own Adam",
                "set optim.update=fused and parallel.zero_stage=0, or optim.moments=float32",
            )


@dataclass
class TrainConfig:
    """Settings of training: length, batch size, device, precision and time limits."""

    tokens: int = 1_000_000
    """Total training tokens, over all epochs; rounded down to whole batches."""
    batch_tokens: int = 2048
    """Tokens in the global batch, over all data replicas."""
    sample_tokens: int = 32_768
    """Number of rows used to calibrate the input scale and the geometric-median bias."""
    init_from: str | None = None
    """Start from the weights of this SAE instead of random ones: a run, a checkpoint, a saved SAE,
    or a folder of SAELens or sparsify. It must have the same architecture and sizes; `sae.k` may
    differ. Read only at the start of a run."""
    device: str = "auto"
    """Device to train on: cpu, cuda, or auto (cuda if available)."""
    compute_dtype: str = "auto"
    """Dtype of matrix products: float32, tf32 (triton kernels), bfloat16, or auto (bfloat16 on
    cuda, float32 on cpu)."""
    kernels: str = "auto"
    """Kernel body, which implements the sparse operations: stock (torch), triton (CUDA), reference
    (plain and slow, for tests), another registered one, or auto (triton on cuda, stock
    elsewhere)."""
    prefilter: str = "auto"
    """Low-precision product that finds TopK candidates, which are then rescored exactly. Rows whose
    candidates are not certified to include the k largest latents are encoded again in full.
    none: no prefilter.
    bfloat16x3 (stock kernels, float32, on the CPU): each row is proven exact.
    bfloat16 (stock kernels, float32, on the CPU): faster; certified with a margin of eight standard
    deviations, assuming independent rounding errors.
    float8 (triton kernels): certified in the same way, with a margin of five, and an allowance for
    the bits that float8 units cut off.
    auto: on the CPU with stock kernels and float32, whichever of none and bfloat16x3 encodes faster
    when the run starts, timed on its own shapes; checkpoints keep the choice. Otherwise none."""
    cuda_graph: str = "auto"
    """Launch a training step as one CUDA graph: auto (with the triton kernels, the fused update and
    a single rank), or off. Results are the same."""
    threads_per_rank: int | None = None
    """CPU threads per rank. If null, the machine's cores divided by the ranks on it, at least 1."""
    timeout_s: float = 600.0
    """Time limit for a collective operation, in seconds. Exceeding it fails the run."""
    hang_timeout_s: float = 600.0
    """Time without a step after which a rank counts as hung, in seconds. The rank then writes its
    thread stacks to its log and exits, and the training group is restarted. Time spent waiting for
    rows of a growing store or for a checkpoint (see `checkpoint.timeout_s`) does not count. Before
    the first step, the limit is `timeout_s` if that is longer."""

    def validate(self) -> None:
        """Validate all fields.

        Raises:
            ConfigError: If a size is out of range, a name is unknown, or the prefilter is
                incompatible with the kernels or the dtype.
        """
        for name in ("tokens", "batch_tokens", "sample_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"train.{name}", getattr(self, name), "at least 1")
        if self.sample_tokens < 2:
            raise ConfigError("train.sample_tokens", self.sample_tokens, "at least 2")
        if self.tokens < self.batch_tokens:
            raise ConfigError(
                "train.tokens", self.tokens, f"at least one batch of {self.batch_tokens} tokens"
            )
        if self.device not in ("auto", "cpu", "cuda"):
            raise ConfigError("train.device", self.device, "auto, cpu or cuda")
        if self.compute_dtype not in ("auto", "float32", "tf32", "bfloat16"):
            raise ConfigError(
                "train.compute_dtype", self.compute_dtype, "auto, float32, tf32 or bfloat16"
            )
        if self.kernels != "auto" and self.kernels not in KERNELS:
            names = ", ".join(["auto", *KERNELS.names()])
            raise ConfigError("train.kernels", self.kernels, f"one of: {names}")
        self._validate_device_of_kernels()
        self.validate_prefilter(self.device)
        if self.cuda_graph not in ("auto", "off"):
            raise ConfigError("train.cuda_graph", self.cuda_graph, "auto or off")
        if self.threads_per_rank is not None and self.threads_per_rank < 1:
            raise ConfigError(
                "train.threads_per_rank", self.threads_per_rank, "at least 1, or null"
            )
        for name in ("timeout_s", "hang_timeout_s"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"train.{name}", getattr(self, name), "more than 0")

    def _validate_device_of_kernels(self) -> None:
        if self.kernels == "auto" or self.device == "auto":
            return
        devices = KERNELS[self.kernels].devices
        # Tests run the triton kernels on the CPU, in Triton's interpreter.
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        if self.device not in devices and not interpreted:
            raise ConfigError(
                "train.kernels",
                self.kernels,
                f"kernels that run on train.device={self.device}, such as "
                f"{default_kernels(self.device)}",
            )

    def validate_prefilter(self, device: str) -> None:
        """Check that kernels and dtype support the prefilter on a device.

        Args:
            device: cpu or cuda, or auto where it is not known yet.

        Raises:
            ConfigError: If they do not.
        """
        name = self.kernels
        if name == "auto" and device != "auto":
            name = default_kernels(device)
        bodies = [body for _, body in KERNELS.items()] if name == "auto" else [KERNELS[name]]
        check_prefilter(self.prefilter, name, bodies, device, self.compute_dtype)

    @property
    def n_steps(self) -> int:
        """Number of optimiser steps in the whole run."""
        return self.tokens // self.batch_tokens


@dataclass
class ParallelConfig:
    """The mesh of trainer ranks: `latent` dictionary shards times `data` replicas."""

    latent: int = 1
    """Number of shards that the dictionary is split into."""
    data: int = 1
    """Number of data replicas; each trains on its own part of the global batch."""
    zero_stage: int = 0
    """DeepSpeed ZeRO stage over the data replicas: 0, or 1 (optimiser state is sharded)."""

    def validate(self, n_latents: int, batch_tokens: int) -> None:
        """Validate all fields.

        Args:
            n_latents: Latents of the SAE (`sae.n_latents`).
            batch_tokens: Tokens in the global batch (`train.batch_tokens`).

        Raises:
            ConfigError: If a value is out of range, or the SAE or the batch cannot be split over
                this mesh.
        """
        for name in ("latent", "data"):
            if getattr(self, name) < 1:
                raise ConfigError(f"parallel.{name}", getattr(self, name), "at least 1")
        if self.zero_stage not in (0, 1):
            raise ConfigError(
                "parallel.zero_stage",
                self.zero_stage,
                "0 or 1",
                "to save more memory, raise parallel.latent",
            )
        if batch_tokens % self.data:
            raise ConfigError(
                "train.batch_tokens",
                batch_tokens,
                f"a multiple of parallel.data={self.data}",
                f"use train.batch_tokens={batch_tokens // self.data * self.data or self.data}",
            )
        # Rounded up, as in `mesh.row_range`: with too many shards, the last shards would be empty.
        rows_per_rank = -(-n_latents // self.latent)
        if rows_per_rank * (self.latent - 1) >= n_latents:
            raise ConfigError(
                "parallel.latent",
                self.latent,
                f"a number of shards that leaves none empty, with sae.n_latents={n_latents} split "
                f"into {rows_per_rank} per shard",
                "use fewer latent shards",
            )

    @property
    def n_ranks(self) -> int:
        """Number of trainer ranks in the mesh."""
        return self.latent * self.data


CHECKPOINTS = "checkpoints"
"""Name of the folder of checkpoints in a run folder."""


@dataclass
class CheckpointConfig:
    """Settings of checkpoints: when to write them, how, and which ones to keep."""

    every_tokens: int = 100_000_000
    """Training tokens between two checkpoints."""
    every_minutes: float | None = 30.0
    """Also save when this many minutes have passed since the last save began, according to rank 0's
    clock. If null, save by tokens only."""
    keep: int = 2
    """Number of newest valid checkpoints to keep; at least 2, so that a run can fall back on an
    older one if the newest is damaged."""
    keep_every_tokens: int | None = None
    """Keep the first checkpoint of every N tokens permanently, with the activations needed to
    resume from the oldest of them. If null, none is kept permanently."""
    asynchronous: bool = True
    """Write checkpoints in the background. Training then waits while weights and moments are copied
    to host memory, and, if half of the available memory cannot hold them, until the rest is
    written. If false, training waits for the whole save: a GPU rank then copies through 128 MiB of
    host memory, and on the CPU no copy is made."""
    grace_s: float = 120.0
    """Seconds from SIGTERM or SIGUSR1 to the end of the process, in which to write a last
    checkpoint. If it is not finished in time, only the earlier checkpoints remain."""
    timeout_s: float = 1800.0
    """Time limit for a save, in seconds. Waiting within this limit does not count as a hang."""
    verify_hashes: bool = True
    """Verify the SHA-256 of every file before loading."""

    def validate(self) -> None:
        """Validate all fields.

        Raises:
            ConfigError: If a value is out of range.
        """
        if self.every_tokens < 1:
            raise ConfigError("checkpoint.every_tokens", self.every_tokens, "at least 1")
        if self.every_minutes is not None and self.every_minutes <= 0:
            raise ConfigError(
                "checkpoint.every_minutes", self.every_minutes, "more than 0, or null"
            )
        if self.keep < 2:
            raise ConfigError(
                "checkpoint.keep",
                self.keep,
                "at least 2, so that an older checkpoint remains if the newest is damaged",
            )
        if self.keep_every_tokens is not None and self.keep_every_tokens < 1:
            raise ConfigError(
                "checkpoint.keep_every_tokens", self.keep_every_tokens, "at least 1, or null"
            )
        for name in ("grace_s", "timeout_s"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"checkpoint.{name}", getattr(self, name), "more than 0")


@dataclass
class TrainerConfig:
    """All settings of the trainer. The run's config has these parts under the same names."""

    sae: SAEConfig = field(default_factory=TopKConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)

    def validate(self) -> None:
        """Validate all parts, and that they are compatible with each other.

        Raises:
            ConfigError: If a value is invalid. The message names the first invalid value found.
        """
        check_settings(self.sae)
        self.train.validate()
        self.optim.validate(self.train.tokens, self.parallel.zero_stage, self.sae.sparse_gradient)
        self.parallel.validate(self.sae.n_latents, self.train.batch_tokens)
        self.checkpoint.validate()

    @property
    def fused(self) -> bool:
        """True if dictionary rows are updated without a dense gradient."""
        return self.optim.fused(self.parallel.zero_stage, self.sae.sparse_gradient)
