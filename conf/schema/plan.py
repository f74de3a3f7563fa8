"""Settings of the plan stage (`plan.*`). This file has no heavy imports."""

from __future__ import annotations

from dataclasses import dataclass, field

from foundation.errors import ConfigError

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
"""Hardware figures that the user may override; null: the value of `plan.hardware`."""


@dataclass
class PlanConfig:
    """The machines that stage=plan plans for. No setting here changes a run."""

    hardware: str = "local"
    """Machines to plan for: local (this machine, measured once), h100, h200 or a100 (SXM modules,
    from data sheets)."""
    n_gpus: int | None = None
    """Search for the fastest mesh of this many GPUs (parallel.latent x parallel.data); null: plan
    the mesh that parallel.* sets."""
    gpus_per_node: int = 8
    """GPUs in a node. They are connected by NVLink, and nodes by the network."""
    tflops: float | None = None
    """Peak dense bfloat16 TFLOP/s of one GPU; null: the value of plan.hardware, as for all settings
    below whose default is null."""
    memory_gib: float | None = None
    """Memory of one GPU in GiB; for CPU ranks, the memory of this machine."""
    memory_gb_per_s: float | None = None
    """Peak memory bandwidth of one GPU, in GB/s."""
    nvlink_gb_per_s: float | None = None
    """NVLink bandwidth of one GPU in one direction, in GB/s."""
    network_gb_per_s: float | None = None
    """Network bandwidth between nodes, per GPU and direction, in GB/s."""
    disk_gb_per_s: float | None = None
    """Read bandwidth of the store's disks to one node, in GB/s."""
    disk_tib: float | None = None
    """Disk space for the store, in TiB; null: check the free space of store.path if
    plan.hardware=local, otherwise check nothing."""
    price_per_hour: float | None = None
    """Price of one GPU in US dollars per hour."""
    dead_fraction: float = 0.05
    """Share of latents that are assumed to be dead and trained by the auxiliary loss; 0: none."""
    harvest_mfu: float = 0.3
    """Share of peak FLOP/s that the language model's forward pass is assumed to reach."""
    simulate: bool = False
    """Simulate the plan at plan.simulate_ranks and print the weak-scaling efficiency."""
    simulate_ranks: list[int] = field(default_factory=list)
    """Numbers of ranks to simulate; empty: those of 8, 16, 64, 256, 1,024 and 4,096 to which the
    plan's mesh can be scaled."""
    simulate_steps: int = 50
    """Steps to simulate at each number of ranks."""
    grow: str = "latents"
    """What the simulation scales with the ranks: latents (the dictionary) or batch (the number of
    data replicas)."""
    jitter: float = 0.02
    """Standard deviation of a computation's time from step to step, as a share of its mean."""
    slow_ranks: float = 0.01
    """Share of ranks that are permanently slower than the others."""
    slow_factor: float = 1.1
    """Time of a computation on a slow rank, as a multiple of the others' time."""
    node_mtbf_hours: float = 6334.0
    """Mean time between failures of a node, in hours. The default is that of the Llama 3 training:
    419 interruptions of 16,384 GPUs in 54 days, or one per 50,670 GPU hours (The Llama 3 Herd of
    Models, arXiv 2407.21783, section 3.3.4)."""
    restart_s: float = 120.0
    """Seconds from a failure to the first step after the newest checkpoint."""

    def validate(self) -> None:
        """Validate all fields.

        Raises:
            ConfigError: If a value is out of range; the error names the setting.
        """
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
            raise ConfigError("plan.simulate_ranks", self.simulate_ranks, "numbers of 1 or more")
        for name in ("dead_fraction", "slow_ranks"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"plan.{name}", getattr(self, name), "between 0 and 1")
        for name in ("jitter", "restart_s"):
            if getattr(self, name) < 0:
                raise ConfigError(f"plan.{name}", getattr(self, name), "0 or more")
        if self.slow_factor < 1:
            raise ConfigError("plan.slow_factor", self.slow_factor, "at least 1")
