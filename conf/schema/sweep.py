"""Settings of a sweep (`sweep.*`). This file has no heavy imports."""

from __future__ import annotations

from dataclasses import dataclass, field

from foundation.errors import ConfigError

AXES = ("n_latents", "k", "lr", "seed", "architecture")


@dataclass
class SweepConfig:
    """A grid of SAEs trained on one store, with one cell per combination of the axes' values."""

    n_latents: list[int] = field(default_factory=list)
    """Dictionary sizes. If empty, only sae.n_latents is used."""
    k: list[int] = field(default_factory=list)
    """Numbers of active latents per row. If empty, only sae.k is used."""
    lr: list[float | None] = field(default_factory=list)
    """Peak learning rates. If empty, only optim.lr is used. A null in the list has the same meaning
    as optim.lr=null: a learning rate proportional to 1/sqrt(n_latents)."""
    seed: list[int] = field(default_factory=list)
    """Seeds of the initial dictionary. If empty, only the run's seed is used. The order of the rows
    is the same in all cells (store.order_seed)."""
    architecture: list[str] = field(default_factory=list)
    """SAE architectures. If empty, only sae.architecture is used."""
    overrides: list[str] = field(default_factory=list)
    """Overrides for individual cells, written CELL:KEY=VALUE, such as `n1024-k32:optim.lr=1e-3`.
    KEY may be a setting of sae (except hookpoint and the axes above), a setting of optim, or
    train.tokens."""
    saes_per_process: int | None = None
    """Number of cells to train concurrently from one row stream. If null, as many as the plan
    estimates will fit in memory. On GPUs, the estimate covers only GPU memory; the host must also
    have enough memory for checkpoint copies of all these cells."""
    diverged_fvu: float | None = 1.0
    """Stop a cell if its FVU is above this value or not finite after diverged_grace_tokens. If
    null, no cell is stopped."""
    diverged_grace_tokens: int = 200_000
    """Number of tokens on which a cell is trained before diverged_fvu applies to it."""

    def validate(self) -> None:
        """Validate all fields.

        Raises:
            ConfigError: If a value is out of range. The message names the setting.
        """
        for axis in AXES:
            values = getattr(self, axis)
            if len(set(values)) < len(values):
                raise ConfigError(f"sweep.{axis}", values, "each value once")
        if any(seed < 0 for seed in self.seed):
            raise ConfigError("sweep.seed", self.seed, "seeds of 0 or more")
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
