"""What a user may set about a sweep. No heavy import here."""

from __future__ import annotations

from dataclasses import dataclass, field

from sae_core.errors import ConfigError

AXES = ("n_latents", "k", "lr", "seed", "architecture")


@dataclass
class SweepConfig:
    """A grid of SAEs over one store; an axis without values keeps the run's own setting."""

    n_latents: list[int] = field(default_factory=list)
    k: list[int] = field(default_factory=list)
    lr: list[float | None] = field(default_factory=list)
    """Peak learning rates; null: the rule of `optim.lr`, proportional to 1/sqrt(n_latents)."""
    seed: list[int] = field(default_factory=list)
    """Of the initial dictionary; the order of the rows is the same for all, `store.order_seed`."""
    architecture: list[str] = field(default_factory=list)
    overrides: list[str] = field(default_factory=list)
    """Settings of one cell alone, CELL:KEY=VALUE, as `n1024-k32:optim.lr=1e-3`; of `sae` (but what
    cells are named after), `optim` and `train.tokens`."""
    saes_per_process: int | None = None
    """Cells that train at once on one stream; null: as many as fit in memory by the plan, on GPUs
    in theirs: the host must hold the checkpoint copies of all."""
    diverged_fvu: float | None = 1.0
    """A cell whose FVU is higher after the grace, or not finite, is stopped; null: none is."""
    diverged_grace_tokens: int = 200_000
    """Training tokens of a cell before it is judged."""

    def validate(self) -> None:
        """Raises: ConfigError: naming the setting that cannot be."""
        for axis in AXES:
            values = getattr(self, axis)
            if len(set(values)) < len(values):
                raise ConfigError(f"sweep.{axis}", values, "each value once")
        if any(seed < 0 for seed in self.seed):
            raise ConfigError("sweep.seed", self.seed, "0 or more each")
        if self.saes_per_process is not None and self.saes_per_process < 1:
            raise ConfigError(
                "sweep.saes_per_process", self.saes_per_process, "at least 1, or null"
            )
        if self.diverged_fvu is not None and self.diverged_fvu <= 0:
            raise ConfigError("sweep.diverged_fvu", self.diverged_fvu, "more than 0, or null")
        if self.diverged_grace_tokens < 0:
            raise ConfigError(
                "sweep.diverged_grace_tokens", self.diverged_grace_tokens, "0 or more"
            )
