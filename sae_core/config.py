"""What a user may set about dictionary, optimiser and training. No torch import here."""

from __future__ import annotations

from dataclasses import dataclass, field

from sae_core.errors import ConfigError


@dataclass
class SAEConfig:
    """One sparse autoencoder."""

    architecture: str = "topk"
    """Name in the architecture registry."""
    hookpoint: str | None = None
    """Array of the store this SAE reconstructs; null takes the first one."""
    n_latents: int = 4096
    k: int = 32
    """Active latents per token."""
    auxk: int | None = None
    """Dead latents per token that explain the residual; null: d_model / 2, as a power of two."""
    auxk_coef: float = 1 / 32
    """Weight of the auxiliary loss; 0 switches it off."""
    auxk_rows: float = 1.0
    """Share of the batch rows on which the auxiliary loss is estimated; 1: all of them."""
    dead_after_tokens: int = 10_000_000
    """A latent is dead when it has fired on none of this many training tokens."""

    def validate(self) -> None:
        """Raises: ConfigError: for a combination no SAE can have."""
        if self.architecture != "topk":
            raise ConfigError("sae.architecture", self.architecture, "one of: topk")
        if self.n_latents < 1:
            raise ConfigError("sae.n_latents", self.n_latents, "at least 1")
        if not 1 <= self.k <= self.n_latents:
            raise ConfigError(
                "sae.k",
                self.k,
                f"between 1 and sae.n_latents={self.n_latents}",
                "lower sae.k or raise sae.n_latents",
            )
        if self.auxk is not None and self.auxk < 1:
            raise ConfigError("sae.auxk", self.auxk, "at least 1, or null for d_model / 2")
        if self.auxk_coef < 0:
            raise ConfigError("sae.auxk_coef", self.auxk_coef, "0 (off) or more")
        if not 0 < self.auxk_rows <= 1:
            raise ConfigError("sae.auxk_rows", self.auxk_rows, "a share above 0, at most 1")
        if self.dead_after_tokens < 1:
            raise ConfigError("sae.dead_after_tokens", self.dead_after_tokens, "at least 1")


@dataclass
class OptimConfig:
    """Adam with linear warm-up, a constant stretch and a linear decay to zero."""

    lr: float | None = None
    """Peak learning rate; null: lr_at_16k / sqrt(n_latents / 2**14)."""
    lr_at_16k: float = 2e-4
    """Of that rule, at 2**14 latents: 2e-4 for long training (Gao et al. 2024); a short one needs
    more."""
    warmup_tokens: int = 0
    decay_tokens: int = 0
    """Length of the final linear decay."""
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 6.25e-10
    clip_norm: float = 1.0
    """Global gradient norm that clipping keeps; 0 switches clipping off."""
    update: str = "auto"
    """fused (used rows only, no dense gradient; ZeRO 0), dense, or auto: fused where it can be."""
    moments: str = "float32"
    """Adam's moments of both matrices: float32 (exact), or bfloat16, stochastically rounded: half
    the bytes, equal in the mean, needs the fused update."""

    def fused(self, zero_stage: int) -> bool:
        """Whether dictionary rows are updated without a dense gradient."""
        return self.update == "fused" or (self.update == "auto" and zero_stage == 0)

    def validate(self, train_tokens: int, zero_stage: int) -> None:
        """Raises: ConfigError: for a value Adam or the schedule cannot have."""
        if self.lr is not None and self.lr <= 0:
            raise ConfigError("optim.lr", self.lr, "more than 0, or null for the 1/sqrt(n) rule")
        if self.lr_at_16k <= 0:
            raise ConfigError("optim.lr_at_16k", self.lr_at_16k, "more than 0")
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            if not 0 <= value < 1:
                raise ConfigError(f"optim.{name}", value, "in [0, 1)")
        if self.eps <= 0:
            raise ConfigError("optim.eps", self.eps, "more than 0")
        if self.update not in ("auto", "fused", "dense"):
            raise ConfigError("optim.update", self.update, "auto, fused or dense")
        if self.update == "fused" and zero_stage:
            raise ConfigError(
                "optim.update",
                self.update,
                "dense or auto with parallel.zero_stage=1: ZeRO flattens what the fused update "
                "needs as rows",
            )
        if self.moments not in ("float32", "bfloat16"):
            raise ConfigError("optim.moments", self.moments, "float32 or bfloat16")
        if self.moments != "float32" and not self.fused(zero_stage):
            raise ConfigError(
                "optim.moments",
                self.moments,
                "float32 with the dense update, whose Adam is torch's own",
                "set optim.update=fused and parallel.zero_stage=0, or optim.moments=float32",
            )
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
                "shorten the warm-up or the decay, or train longer",
            )


@dataclass
class TrainConfig:
    """How long, on what, and in which pieces."""

    tokens: int = 1_000_000
    """Training tokens in all, epochs counted; rounded down to whole batches."""
    batch_tokens: int = 2048
    """Global batch, over all data replicas."""
    sample_tokens: int = 32_768
    """Rows that calibrate the input scale and the geometric-median bias."""
    device: str = "auto"
    """auto, cpu or cuda."""
    compute_dtype: str = "auto"
    """GEMM dtype: auto (bfloat16 on cuda, float32 on cpu), float32, tf32 (triton) or bfloat16."""
    kernels: str = "auto"
    """Body of the sparse operations: stock (torch), triton (CUDA), reference (plain, slow), or
    auto: triton on cuda, stock elsewhere."""
    prefilter: str = "auto"
    """Cheap product that finds TopK candidates, which are rescored exactly; rows whose candidates
    are not certified to hold the k largest are encoded again. none; bfloat16x3 (stock kernels,
    float32: proven row by row); bfloat16 (likewise, faster: certified by eight standard deviations
    of rounding errors taken as independent); float8 (triton: by six); auto: bfloat16x3 on CPUs that
    multiply bfloat16 in hardware, else none."""
    threads_per_rank: int | None = None
    """CPU threads of each rank; null: cores / ranks on this machine, at least 1."""
    timeout_s: float = 600.0
    """A collective that takes longer than this fails the run."""
    hang_timeout_s: float = 600.0
    """A rank that makes no step for so long, without waiting for rows of a growing store or for a
    checkpoint (`checkpoint.timeout_s`), writes its stacks to its log and ends; the group is started
    anew. `timeout_s` before the first step."""

    def validate(self) -> None:
        """Raises: ConfigError: for impossible sizes or unknown names."""
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
        prefilters = ("auto", "none", "bfloat16x3", "bfloat16", "float8")
        if self.prefilter not in prefilters:
            raise ConfigError("train.prefilter", self.prefilter, f"one of {', '.join(prefilters)}")
        if self.kernels not in ("auto", "stock", "triton", "reference"):
            raise ConfigError("train.kernels", self.kernels, "auto, stock, triton or reference")
        self._validate_prefilter()
        if self.threads_per_rank is not None and self.threads_per_rank < 1:
            raise ConfigError(
                "train.threads_per_rank", self.threads_per_rank, "at least 1, or null"
            )
        for name in ("timeout_s", "hang_timeout_s"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"train.{name}", getattr(self, name), "more than 0")

    def _validate_prefilter(self) -> None:
        """What is known before a rank looks at its device."""
        by_device = {"cpu": "stock", "cuda": "triton"}
        kernels = by_device.get(self.device) if self.kernels == "auto" else self.kernels
        if kernels is None or self.prefilter in ("auto", "none"):
            return
        possible = {"stock": ("bfloat16x3", "bfloat16"), "triton": ("float8",)}.get(kernels, ())
        if self.prefilter not in possible:
            names = ", ".join(("auto", "none", *possible))
            raise ConfigError(
                "train.prefilter", self.prefilter, f"one of {names} with train.kernels={kernels}"
            )
        if self.compute_dtype == "tf32" or (
            kernels == "stock" and self.compute_dtype == "bfloat16"
        ):
            raise ConfigError(
                "train.prefilter",
                self.prefilter,
                f"none with train.compute_dtype={self.compute_dtype}",
            )

    @property
    def n_steps(self) -> int:
        """Optimiser steps in the whole run."""
        return self.tokens // self.batch_tokens


@dataclass
class ParallelConfig:
    """The mesh: `latent` shards of the dictionary times `data` replicas."""

    latent: int = 1
    data: int = 1
    zero_stage: int = 0
    """DeepSpeed ZeRO stage over the data replicas: 0 or 1."""

    def validate(self, n_latents: int, batch_tokens: int) -> None:
        """Raises: ConfigError: for a mesh the SAE or the batch cannot be split over."""
        for name in ("latent", "data"):
            if getattr(self, name) < 1:
                raise ConfigError(f"parallel.{name}", getattr(self, name), "at least 1")
        if self.zero_stage not in (0, 1):
            raise ConfigError(
                "parallel.zero_stage",
                self.zero_stage,
                "0 or 1",
                "shard over parallel.latent instead",
            )
        if batch_tokens % self.data:
            raise ConfigError(
                "train.batch_tokens",
                batch_tokens,
                f"a multiple of parallel.data={self.data}",
                f"use {batch_tokens // self.data * self.data or self.data}",
            )
        rows_per_rank = -(-n_latents // self.latent)
        if rows_per_rank * (self.latent - 1) >= n_latents:
            raise ConfigError(
                "parallel.latent",
                self.latent,
                f"shards that each hold some of sae.n_latents={n_latents} ({rows_per_rank} a rank)",
                "use fewer latent shards",
            )

    @property
    def n_ranks(self) -> int:
        """Processes in the trainer's mesh."""
        return self.latent * self.data


@dataclass
class CheckpointConfig:
    """When checkpoints are written, how, and which ones stay."""

    every_tokens: int = 100_000_000
    every_minutes: float | None = 30.0
    """Also when the last one began so long ago, by rank 0's clock; null: by tokens alone."""
    keep: int = 2
    """Newest valid checkpoints that stay; at least 2, so that a damaged one has a predecessor."""
    keep_every_tokens: int | None = None
    """The first checkpoint in every stretch of so many tokens stays for good; activations that a
    resume from the oldest of them would need then stay, too. null: none stays."""
    asynchronous: bool = True
    """Training waits only for a copy of weights and moments in host memory, which is written in
    the background; false: it waits for the files, and needs no such memory on the CPU."""
    grace_s: float = 120.0
    """From SIGTERM or SIGUSR1 to the end of the process: time for a last checkpoint. When it is
    over, the process leaves with the checkpoints that are there."""
    timeout_s: float = 1800.0
    """A save may take so long: training that waits for it is then no hang, and no rank waits longer
    for another one's part."""
    verify_hashes: bool = True
    """Check SHA-256 of every file before loading."""

    def validate(self) -> None:
        """Raises: ConfigError: for a cadence or a count that would lose work."""
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
                "at least 2, so that a damaged newest checkpoint has a predecessor",
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
    """Everything the trainer takes; the run's config carries these parts under the same names."""

    sae: SAEConfig = field(default_factory=SAEConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)

    def validate(self) -> None:
        """Raises: ConfigError: naming the first part that cannot be."""
        self.sae.validate()
        self.train.validate()
        self.optim.validate(self.train.tokens, self.parallel.zero_stage)
        self.parallel.validate(self.sae.n_latents, self.train.batch_tokens)
        self.checkpoint.validate()
