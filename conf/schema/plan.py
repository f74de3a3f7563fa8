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
"""Hardware figures that the user may override. If one is null, `plan.hardware` determines it."""


@dataclass
class PlanConfig:
    """The machines that stage=plan plans for. No setting here changes a run."""

    hardware: str = "local"
    """Machines to plan for: local (this machine, measured once), or h100, h200 or a100 (SXM
    modules, with figures from data sheets)."""
    n_gpus: int | None = None
    """Number of GPUs for which to find the fastest mesh (parallel.latent x parallel.data). If null,
    the mesh set by parallel.* is planned."""
    gpus_per_node: int = 8
    """Number of GPUs in a node. NVLink connects the GPUs of a node, and the network connects the
    nodes."""
    tflops: float | None = None
    """Peak dense bfloat16 TFLOP/s of one GPU. If null, plan.hardware determines the value; this
    also applies to the settings below whose default is null, unless they say otherwise."""
    memory_gib: float | None = None
    """Memory of one GPU, in GiB. For CPU ranks: memory of this machine."""
    host_memory_gib: float | None = None
    """Memory of a GPU node for all its ranks, in GiB. If null, that of this machine with
    plan.hardware=local; otherwise enough is assumed for whole copies of checkpoints."""
    memory_gb_per_s: float | None = None
    """Peak memory bandwidth of one GPU, in GB/s."""
    nvlink_gb_per_s: float | None = None
    """NVLink bandwidth per GPU and direction, in GB/s."""
    network_gb_per_s: float | None = None
    """Network bandwidth between nodes, per GPU and direction, in GB/s."""
    disk_gb_per_s: float | None = None
    """Bandwidth at which one node reads from the store's disks, in GB/s."""
    disk_tib: float | None = None
    """Disk space for the store, in TiB. If null, the free space at store.path is checked with
    plan.hardware=local, and nothing is checked otherwise."""
    price_per_hour: float | None = None
    """Price of one GPU in US dollars per hour."""
    dead_fraction: float = 0.05
    """Fraction of latents assumed to be dead and trained with the auxiliary loss."""
    harvest_mfu: float = 0.3
    """Fraction of peak FLOP/s that the language model's forward pass is assumed to reach."""
    simulate: bool = False
    """Simulate the plan with the numbers of ranks in plan.simulate_ranks, and print the
    weak-scaling efficiency."""
    simulate_ranks: list[int] = field(default_factory=list)
    """Numbers of ranks to simulate. If empty, 8, 16, 64, 256, 1,024 and 4,096 are used, except
    those to which the plan's mesh cannot be scaled."""
    simulate_steps: int = 50
    """Number of steps to simulate for each number of ranks."""
    grow: str = "latents"
    """What the simulation scales with the number of ranks: latents (the dictionary size) or batch
    (the number of data replicas)."""
    jitter: float = 0.02
    """Standard deviation of a computation's time across steps, as a fraction of the mean time."""
    slow_ranks: float = 0.01
    """Fraction of ranks that are permanently slower than the others."""
    slow_factor: float = 1.1
    """Time of a computation on a slow rank, as a multiple of the time on the other ranks."""
    node_mtbf_hours: float = 6334.0
    """Mean time between failures of a node, in hours. The default comes from the training of
    Llama 3, in which 16,384 GPUs had 419 interruptions in 54 days, or one per 50,670 GPU hours (The
    Llama 3 Herd of Models, arXiv 2407.21783, section 3.3.4)."""
    restart_s: float = 120.0
    """Seconds from a failure until training resumes from the newest checkpoint."""

    def validate(self) -> None:
        """Validate all fields.

        Raises:
            ConfigError: If a value is out of range. The message names the setting.
        """
        if self.hardware not in HARDWARE:
            raise ConfigError("plan.hardware", self.hardware, f"one of: {', '.join(HARDWARE)}")
        if self.grow not in ("latents", "batch"):
            raise ConfigError("plan.grow", self.grow, "latents or batch")
        for name in ("n_gpus", "gpus_per_node", "simulate_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"plan.{name}", value, "at least 1")
        for name in (*_OVERRIDES, "disk_tib", "host_memory_gib", "node_mtbf_hours", "harvest_mfu"):
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
