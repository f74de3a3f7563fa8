"""Layouts: the cost of a mesh of ranks, whether it fits, and which mesh of N ranks is fastest.

The trainer has no micro-batches: all rows of a replica go through a step at once. The search
therefore covers the mesh shapes latent x data, and the kind of gradients that replicas exchange:
sparse gradients with the fused update, or dense gradients with ZeRO 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from cluster.planning.hardware import GIB, Hardware
from cluster.planning.memory import blocking_bytes, device_bytes, host_bytes
from cluster.planning.step_buffers import gpu_buffers, peak
from cluster.planning.step_time import (
    Phase,
    expected_prefilter,
    read_seconds,
    schedule,
    step_seconds,
)
from cluster.planning.work import Work, work_of
from conf.schema.run import RunConfig
from foundation.errors import ConfigError
from foundation.units import bytes_text
from sae_core.architectures.topk.settings import MOST_AUX_PAIRS
from sae_core.config import ParallelConfig

_ROOM = 0.95
"""Share of the memory that a plan may fill, because allocators leave gaps."""


_GPU_PROCESS_HOST_BYTES = 4 * GIB
"""Assumed host memory of a GPU rank's process: libraries, CUDA, NCCL. Not measured."""


@dataclass(frozen=True)
class Layout:
    """The plan of one mesh."""

    parallel: ParallelConfig
    """The mesh."""
    work: Work
    """The work of rank 0, whose shard is the largest."""
    device: dict[str, float]
    """Bytes of a rank on its device, by part; see `memory.device_bytes`."""
    host: dict[str, float]
    """Other bytes of a rank on the host, by part; see `memory.host_bytes`."""
    limit_bytes: float
    """Memory of the device or, on the CPU, of the machine for all its ranks. 0 if unknown."""
    phases: list[Phase]
    """Computations and collectives of a step, in order."""
    read_s: float
    """Seconds for reading a rank's part of a batch."""

    @property
    def device_total(self) -> float:
        """Bytes of one rank on its device."""
        return sum(self.device.values())

    @property
    def needed_bytes(self) -> float:
        """Bytes to compare with `limit_bytes`. On the CPU: all ranks' bytes, with host copies."""
        if self.work.on_gpu:
            return self.device_total
        return (self.device_total + sum(self.host.values())) * self.work.n_ranks

    @property
    def blocking_bytes(self) -> float:
        """Bytes of a checkpoint that each rank writes before training continues."""
        return blocking_bytes(self.work, self.host.get("checkpoint copy", 0.0))

    @property
    def fits(self) -> bool:
        """True if the layout fits in memory, or the limit is unknown."""
        return self.limit_bytes <= 0 or self.needed_bytes <= _ROOM * self.limit_bytes

    @property
    def exchange(self) -> str:
        """Kind of gradients that replicas send to each other."""
        if self.work.data == 1:
            return "none"
        if self.work.fused:
            return "sparse"
        return "dense, ZeRO 1" if self.work.zero_stage else "dense"

    @property
    def step_s(self) -> float:
        """Seconds of a step or of reading a batch, whichever is longer, because the two overlap."""
        return max(step_seconds(self.phases), self.read_s)


def plan_layout(
    config: RunConfig, d_model: int, hardware: Hardware, parallel: ParallelConfig
) -> Layout:
    """Plan one mesh.

    Args:
        config: Config of the run.
        d_model: Width D of the activations.
        hardware: Hardware of one rank.
        parallel: The mesh.
    """
    work = work_of(
        config,
        d_model,
        on_gpu=hardware.device == "cuda",
        parallel=parallel,
    )
    if config.train.prefilter == "auto":
        work = replace(work, prefilter=expected_prefilter(work, config.train, hardware))
    device = device_bytes(work, hardware)
    return Layout(
        parallel,
        work,
        device,
        host_bytes(work, _host_room_bytes(work, hardware, sum(device.values()))),
        hardware.memory_bytes,
        schedule(work, hardware),
        read_seconds(work, hardware),
    )


def _host_room_bytes(work: Work, hardware: Hardware, device_bytes: float) -> float:
    """Return the host memory that remains for one rank's loader and checkpoints."""
    if work.on_gpu:
        ranks = min(work.n_ranks, hardware.ranks_per_node)
        room = hardware.host_memory_bytes / ranks - _GPU_PROCESS_HOST_BYTES
        known = hardware.host_memory_bytes > 0
    else:
        room = hardware.memory_bytes / work.n_ranks - device_bytes
        known = hardware.memory_bytes > 0
    return max(room, 0.0) if known else float("inf")


def layouts(config: RunConfig, d_model: int, hardware: Hardware, n: int) -> list[Layout]:
    """Plan every mesh of `n` ranks with each kind of exchange.

    Returns:
        The layouts that fit, fastest first, followed by the layouts that do not fit.
        `config.parallel` is ignored.
    """
    found = [plan_layout(config, d_model, hardware, mesh) for mesh in _meshes(config, n)]
    # If the disks limit several layouts equally, prefer the one with the shortest computation.
    return sorted(found, key=lambda one: (not one.fits, one.step_s, step_seconds(one.phases)))


def best_layout(found: list[Layout], config: RunConfig) -> Layout:
    """Return the fastest layout that fits: the first of `layouts`.

    Raises:
        ConfigError: If no layout fits, or no mesh has this number of ranks.
    """
    if not found:
        raise ConfigError(
            "plan.n_gpus",
            config.plan.n_gpus,
            f"a product latent x data in which data divides train.batch_tokens="
            f"{config.train.batch_tokens} and latent is at most "
            f"sae.n_latents={config.sae.n_latents}",
        )
    if not found[0].fits:
        raise too_large_error(min(found, key=lambda layout: layout.needed_bytes), config)
    return found[0]


def too_large_error(layout: Layout, config: RunConfig) -> ConfigError:
    """Return the error for a layout that is too large. The remedy depends on the largest part."""
    need = bytes_text(layout.needed_bytes)
    room = bytes_text(_ROOM * layout.limit_bytes)
    whose = "a rank needs" if layout.work.on_gpu else f"{layout.work.n_ranks} ranks need"
    where = "per GPU" if layout.work.on_gpu else "on this machine"
    parts = sorted(layout.device.items(), key=lambda part: -part[1])
    largest = ", ".join(f"{name} {bytes_text(size)}" for name, size in parts[:3])
    mesh = layout.parallel
    expected = (
        f"at most {room} {where}, but {whose} {need} with latent {mesh.latent} x "
        f"data {mesh.data} (largest parts of a rank: {largest})"
    )
    if _fits_without_auxk(layout):
        share = layout.work.aux_rows / layout.work.rows
        return ConfigError(
            "sae.auxk_rows",
            getattr(config.sae, "auxk_rows", None) or share,
            expected,
            f"use a smaller share, or null, which gives at most {MOST_AUX_PAIRS:,} pairs",
        )
    if parts[0][0] == "step":
        remedy = "use a smaller batch, or more data replicas (parallel.data)"
        return ConfigError("train.batch_tokens", config.train.batch_tokens, expected, remedy)
    if parts[0][0] == "loader":
        return ConfigError(
            "store.buffer_tokens", config.store.buffer_tokens, expected, "use a smaller buffer"
        )
    return ConfigError("sae.n_latents", config.sae.n_latents, expected, _smaller(layout, config))


def _fits_without_auxk(layout: Layout) -> bool:
    """Return True if the auxiliary path is what makes a GPU layout too large."""
    work = layout.work
    if not work.on_gpu or not work.auxk:
        return False
    without = replace(work, auxk=0, aux_rows=0, dead=0)
    saved = layout.device["step"] - sum(peak(gpu_buffers(without))[1].values())
    return layout.device_total - saved <= _ROOM * layout.limit_bytes


def _smaller(layout: Layout, config: RunConfig) -> str:
    """Return, as text, the changes that would reduce the memory of the SAE itself."""
    remedies = ["use fewer latents"]
    if layout.work.on_gpu:
        remedies.append(f"more GPUs (parallel.latent above {layout.parallel.latent})")
    else:
        remedies.append("more machines")
    if layout.work.fused and config.optim.moments == "float32":
        remedies.append("optim.moments=bfloat16")
    if not layout.work.fused and not layout.work.zero_stage and config.sae.sparse_gradient:
        remedies.append("optim.update=fused")
    return ", or ".join(remedies)


def _meshes(config: RunConfig, n: int) -> Iterator[ParallelConfig]:
    """Yield the meshes of `n` ranks that are valid for the config, with and without ZeRO 1."""
    for latent in range(1, n + 1):
        if n % latent:
            continue
        data = n // latent
        for zero_stage in (0, 1) if data > 1 else (0,):  # ZeRO needs at least two replicas
            mesh = ParallelConfig(latent, data, zero_stage)
            try:
                mesh.validate(config.sae.n_latents, config.train.batch_tokens)
                sparse = config.sae.sparse_gradient
                config.optim.validate(config.train.tokens, zero_stage, sparse)
            except ConfigError:
                continue
            yield mesh
