"""Settings of a sweep (`sweep.*`). This file has no heavy imports."""

from __future__ import annotations

from dataclasses import dataclass, field

from foundation.errors import ConfigError

AXES = ("n_latents", "k", "lr", "seed", "architecture")


@dataclass
class SweepConfig:
    """A grid of SAEs trained on one store: one cell per combination of the axes' values."""

    n_latents: list[int] = field(default_factory=list)
    """Dictionary sizes; empty: sae.n_latents only."""
    k: list[int] = field(default_factory=list)
    """Numbers of active latents per row; empty: sae.k only."""
    lr: list[float | None] = field(default_factory=list)
    """Peak learning rates; empty: optim.lr only. A null value in the list uses the rule of
    optim.lr=null, proportional to 1/sqrt(n_latents)."""
    seed: list[int] = field(default_factory=list)
    """Seeds of the initial dictionary; empty: seed only. The order of the rows is the same in all
    cells (store.order_seed)."""
    architecture: list[str] = field(default_factory=list)
    """SAE architectures; empty: sae.architecture only."""
    overrides: list[str] = field(default_factory=list)
    """Settings for single cells, CELL:KEY=VALUE, for example `n1024-k32:optim.lr=1e-3`. KEY is in
    sae (except hookpoint and the axes above), in optim, or train.tokens."""
    saes_per_process: int | None = None
    """Cells that train at the same time from one row stream; null: as many as the plan says fit in
    memory. On GPUs only their own memory is counted, and the host needs room for the checkpoint
    copies of all these cells."""
    diverged_fvu: float | None = 1.0
    """Stop a cell if its FVU is above this value or not finite, after diverged_grace_tokens; null:
    never."""
    diverged_grace_tokens: int = 200_000
    """Tokens that a cell is trained on before diverged_fvu applies to it."""

    def validate(self) -> None:
        """Validate all fields.

        Raises:
            ConfigError: If a value is out of range; the error names the setting.
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
