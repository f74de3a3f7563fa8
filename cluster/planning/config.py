"""What a user may set about the plan. No heavy import here."""

from __future__ import annotations

from dataclasses import dataclass, field

from sae_core.errors import ConfigError

HARDWARE = ("local", "h100", "h200", "a100")
_OVERRIDES = (
    "tflops",
    "memory_gib",
    "memory_gb_per_s",
    "nvlink_gb_per_s",
    "network_gb_per_s",
    "disk_gb_per_s",
    "price_per_hour",
)
"""Numbers of the hardware that a user may know better."""


@dataclass
class PlanConfig:
    """For which machines stage=plan plans; nothing here changes a run."""

    hardware: str = "local"
    """local (measured on this machine, once), h100, h200 or a100 (SXM, from data sheets)."""
    n_gpus: int | None = None
    """Search the fastest parallel.latent x parallel.data of so many; null: parallel.* as it is."""
    gpus_per_node: int = 8
    """Joined by NVLink; nodes are joined by the network."""
    tflops: float | None = None
    """Peak dense bfloat16 of one GPU; null, here and below: as the hardware has it."""
    memory_gib: float | None = None
    """Of one GPU; on the CPU, of this machine."""
    memory_gb_per_s: float | None = None
    """Peak memory bandwidth of one GPU."""
    nvlink_gb_per_s: float | None = None
    """Between GPUs of a node, of one GPU in one direction."""
    network_gb_per_s: float | None = None
    """Between nodes, of one GPU in one direction."""
    disk_gb_per_s: float | None = None
    """What the disks that hold the store give to one node."""
    disk_tib: float | None = None
    """Room for the store; null: free space is looked at for hardware=local alone."""
    price_per_hour: float | None = None
    """Of one GPU, US dollars."""
    dead_fraction: float = 0.05
    """Share of dead latents, on which the auxiliary loss works; 0: there are none."""
    harvest_mfu: float = 0.3
    """Share of the peak that the language model's forward pass reaches."""
    simulate: bool = False
    """Simulate the plan at `simulate_ranks` and print the weak-scaling efficiency."""
    simulate_ranks: list[int] = field(default_factory=list)
    """Empty: those of 8 to 4,096 to which the plan's mesh can grow or shrink."""
    simulate_steps: int = 50
    grow: str = "latents"
    """What grows with the ranks: latents (the dictionary) or batch (data replicas)."""
    jitter: float = 0.02
    """Standard deviation of a computation's time from step to step, as a share of it."""
    slow_ranks: float = 0.01
    """Share of ranks that are slower than the rest, all the time."""
    slow_factor: float = 1.1
    """How many times as long they take."""
    node_mtbf_hours: float = 6334.0
    """Mean time between failures of a node. 419 interruptions of 16,384 GPUs in 54 days are one in
    50,670 hours of a GPU (The Llama 3 Herd of Models, arXiv 2407.21783, section 3.3.4)."""
    restart_s: float = 120.0
    """From a failure to the first step after the newest checkpoint."""

    def validate(self) -> None:
        """Raises: ConfigError: naming the setting that cannot be."""
        if self.hardware not in HARDWARE:
            raise ConfigError("plan.hardware", self.hardware, f"one of: {', '.join(HARDWARE)}")
        if self.grow not in ("latents", "batch"):
            raise ConfigError("plan.grow", self.grow, "latents or batch")
        for name in ("n_gpus", "gpus_per_node", "simulate_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"plan.{name}", value, "at least 1")
        for name in (*_OVERRIDES, "disk_tib", "node_mtbf_hours", "harvest_mfu"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ConfigError(f"plan.{name}", value, "more than 0")
        self._validate_simulation()

    def _validate_simulation(self) -> None:
        if min(self.simulate_ranks, default=1) < 1:
            raise ConfigError("plan.simulate_ranks", self.simulate_ranks, "numbers of at least 1")
        for name in ("dead_fraction", "slow_ranks"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"plan.{name}", getattr(self, name), "between 0 and 1")
        for name in ("jitter", "restart_s"):
            if getattr(self, name) < 0:
                raise ConfigError(f"plan.{name}", getattr(self, name), "0 or more")
        if self.slow_factor < 1:
            raise ConfigError("plan.slow_factor", self.slow_factor, "at least 1")
