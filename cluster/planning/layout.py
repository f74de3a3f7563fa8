"""What a mesh costs, whether it fits, and which one of N ranks is the fastest.

The trainer has no micro-batches: a replica's rows go through one step at once. So the search is
over latent x data, and over what replicas send to each other: what the gradient is made of (the
fused update), or dense gradients with ZeRO 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from cluster.planning.hardware import GIB, Hardware
from cluster.planning.memory import device_bytes, host_bytes
from cluster.planning.step_time import Phase, read_seconds, schedule, step_seconds
from cluster.planning.work import Work, work_of
from conf.schema import RunConfig
from sae_core.config import ParallelConfig
from sae_core.errors import ConfigError

_ROOM = 0.95
"""Of the memory: allocators leave gaps."""


@dataclass(frozen=True)
class Layout:
    """One mesh, planned."""

    parallel: ParallelConfig
    work: Work
    device: dict[str, float]
    """Bytes by part; see `memory.device_bytes`."""
    host: dict[str, float]
    limit_bytes: float
    """Of what a rank takes on its device; on the CPU of what all ranks of a machine take."""
    phases: list[Phase]
    read_s: float

    @property
    def device_total(self) -> float:
        """Bytes of one rank on its device."""
        return sum(self.device.values())

    @property
    def needed_bytes(self) -> float:
        """What is held against `limit_bytes`: on the CPU, ranks and their host copies together."""
        if self.work.on_gpu:
            return self.device_total
        return (self.device_total + sum(self.host.values())) * self.work.n_ranks

    @property
    def fits(self) -> bool:
        """Whether there is room."""
        return self.limit_bytes <= 0 or self.needed_bytes <= _ROOM * self.limit_bytes

    @property
    def exchange(self) -> str:
        """The gradients that replicas send to each other."""
        if self.work.data == 1:
            return "none"
        if self.work.fused:
            return "sparse"
        return "dense, ZeRO 1" if self.work.zero_stage else "dense"

    @property
    def step_s(self) -> float:
        """Of a step; reading goes on beside it."""
        return max(step_seconds(self.phases), self.read_s)


def plan_layout(
    config: RunConfig, d_model: int, hardware: Hardware, parallel: ParallelConfig
) -> Layout:
    """One mesh.

    Args:
        config: of the run.
        d_model: D.
        hardware: of one rank.
        parallel: the mesh.
    """
    work = work_of(
        config,
        d_model,
        on_gpu=hardware.device == "cuda",
        prefilter=hardware.prefilter,
        parallel=parallel,
    )
    return Layout(
        parallel,
        work,
        device_bytes(work, hardware),
        host_bytes(work),
        hardware.memory_bytes,
        schedule(work, hardware),
        read_seconds(work, hardware),
    )


def layouts(config: RunConfig, d_model: int, hardware: Hardware, n: int) -> list[Layout]:
    """Every mesh of `n` ranks with each exchange, the fastest that fits first.

    Those that do not fit come last. The config's own `parallel` is one of them only by its ranks.
    """
    found = [plan_layout(config, d_model, hardware, mesh) for mesh in _meshes(config, n)]
    # Where all wait for the disks alike: the one that leaves them the most time.
    return sorted(found, key=lambda one: (not one.fits, one.step_s, step_seconds(one.phases)))


def best_layout(found: list[Layout], config: RunConfig) -> Layout:
    """The first one that fits.

    Raises:
        ConfigError: none fits, or there is no mesh of so many ranks.
    """
    if not found:
        raise ConfigError(
            "plan.n_gpus",
            config.plan.n_gpus,
            f"a number latent x data, where data divides train.batch_tokens="
            f"{config.train.batch_tokens} and each latent shard holds some of "
            f"sae.n_latents={config.sae.n_latents}",
        )
    if not found[0].fits:
        raise cannot_fit(min(found, key=lambda layout: layout.needed_bytes), config)
    return found[0]


def cannot_fit(layout: Layout, config: RunConfig) -> ConfigError:
    """What to say of a layout that is too large: the largest part decides what to change."""
    need, room = layout.needed_bytes / GIB, _ROOM * layout.limit_bytes / GIB
    whose = "a rank needs" if layout.work.on_gpu else f"{layout.work.n_ranks} ranks need"
    where = "of its device" if layout.work.on_gpu else "of this machine"
    parts = sorted(layout.device.items(), key=lambda part: -part[1])
    largest = ", ".join(f"{name} {size / GIB:.1f}" for name, size in parts[:3])
    mesh = layout.parallel
    expected = (
        f"at most {room:.1f} GiB {where}, {whose} {need:.1f} GiB at latent {mesh.latent} x data "
        f"{mesh.data} (of a rank: {largest})"
    )
    if parts[0][0] == "step":
        return ConfigError(
            "train.batch_tokens",
            config.train.batch_tokens,
            expected,
            "use a smaller batch, more data replicas (parallel.data), or sae.auxk_rows below 1",
        )
    if parts[0][0] == "loader":
        return ConfigError(
            "store.buffer_tokens", config.store.buffer_tokens, expected, "use a smaller buffer"
        )
    return ConfigError("sae.n_latents", config.sae.n_latents, expected, _smaller(layout, config))


def _smaller(layout: Layout, config: RunConfig) -> str:
    remedies = ["use fewer latents"]
    if layout.work.on_gpu:
        remedies.append(f"more GPUs (parallel.latent above {layout.parallel.latent})")
    else:
        remedies.append("more machines")
    if layout.work.fused and config.optim.moments == "float32":
        remedies.append("optim.moments=bfloat16")
    if not layout.work.fused and not layout.work.zero_stage:
        remedies.append("optim.update=fused")
    return ", or ".join(remedies)


def _meshes(config: RunConfig, n: int) -> Iterator[ParallelConfig]:
    for latent in range(1, n + 1):
        if n % latent:
            continue
        data = n // latent
        for zero_stage in (0, 1) if data > 1 else (0,):  # one replica has nothing to share
            mesh = ParallelConfig(latent, data, zero_stage)
            try:
                mesh.validate(config.sae.n_latents, config.train.batch_tokens)
                config.optim.validate(config.train.tokens, zero_stage)
            except ConfigError:
                continue
            yield mesh
