"""Weak scaling by simulation: the plan at more ranks, each with the share that it has now."""

from __future__ import annotations

from dataclasses import replace

from cluster.planning.hardware import Hardware
from cluster.planning.layout import Layout, plan_layout
from cluster.planning.simulate import Cadence, Noise, simulate_run, simulate_step
from cluster.planning.step_time import compute_seconds
from cluster.planning.tables import Simulated
from conf.schema import RunConfig
from sae_core.config import ParallelConfig
from sae_core.errors import ConfigError

_RANKS = (8, 16, 64, 256, 1024, 4096)


def weak_scaling(config: RunConfig, d_model: int, hardware: Hardware) -> list[Simulated]:
    """One row for each of `plan.simulate_ranks`, by default of those that are possible.

    Raises:
        ConfigError: a number of ranks that the plan's mesh cannot be scaled to.
    """
    planned = plan_layout(config, d_model, hardware, config.parallel)
    share_s = compute_seconds(planned.phases)
    ranks = config.plan.simulate_ranks or [n for n in _RANKS if _can_be(config, n)]
    return [_at(config, d_model, hardware, n, share_s) for n in ranks]


def _can_be(config: RunConfig, n_ranks: int) -> bool:
    try:
        grown(config, n_ranks)
    except ConfigError:
        return False
    return True


def grown(config: RunConfig, n_ranks: int) -> RunConfig:
    """The config at `n_ranks`, a rank's share as it is: dictionary or batch grow, or shrink.

    Raises:
        ConfigError: the share would not stay whole.
    """
    mesh, latents = config.parallel, config.plan.grow == "latents"
    fixed = mesh.data if latents else mesh.latent
    grows = mesh.latent if latents else mesh.data
    total = config.sae.n_latents if latents else config.train.batch_tokens
    part, left = divmod(n_ranks, fixed)
    if left or part < 1 or total * part % grows:
        raise ConfigError(
            "plan.simulate_ranks",
            n_ranks,
            f"multiples of parallel.{'data' if latents else 'latent'}={fixed}, at which a rank's "
            "share stays whole",
        )
    scaled = total * part // grows
    if latents:
        sae = replace(config.sae, n_latents=scaled)
        return replace(config, sae=sae, parallel=ParallelConfig(part, fixed, mesh.zero_stage))
    train = replace(config.train, batch_tokens=scaled)
    return replace(config, train=train, parallel=ParallelConfig(fixed, part, mesh.zero_stage))


def _at(
    config: RunConfig, d_model: int, hardware: Hardware, n_ranks: int, share_s: float
) -> Simulated:
    scaled, plan = grown(config, n_ranks), config.plan
    layout = plan_layout(scaled, d_model, hardware, scaled.parallel)
    noise = Noise(plan.jitter, plan.slow_ranks, plan.slow_factor)
    mesh = scaled.parallel
    # What replicas compute once more is no use; what more shards spare a rank is no credit.
    useful_s = min(share_s, compute_seconds(layout.phases))
    step_s = simulate_step(
        layout.phases,
        mesh.latent,
        mesh.data,
        noise,
        read_s=layout.read_s,
        steps=plan.simulate_steps,
        seed=config.seed,
    )
    # The length of the plan's own run, whatever the batch has grown to.
    n_steps = config.train.n_steps
    cadence = _cadence(scaled, layout, hardware, step_s)
    cost = simulate_run(n_steps, step_s, cadence, config.seed)
    return Simulated(
        n_ranks,
        f"{mesh.latent:,} x {mesh.data:,}",
        step_s,
        useful_s / step_s,
        cost.failures,
        n_steps * useful_s / cost.seconds,
    )


def _cadence(config: RunConfig, layout: Layout, hardware: Hardware, step_s: float) -> Cadence:
    """A save comes by tokens or by the clock, whichever is first."""
    checkpoint, plan, work = config.checkpoint, config.plan, layout.work
    every = max(1, checkpoint.every_tokens // config.train.batch_tokens)
    if checkpoint.every_minutes is not None:
        every = min(every, max(1, int(60 * checkpoint.every_minutes / step_s)))
    ranks = min(work.n_ranks, hardware.ranks_per_node)
    saved = 2 * work.matrix * (4 + 2 * work.moment_bytes) / work.data
    written_s = saved * ranks / hardware.disk_bytes_per_s
    bus = _PCIE_BYTES_PER_S if work.on_gpu else hardware.rates.stream_bytes / ranks
    pause_s = saved / bus + (0 if work.asynchronous_save else written_s)
    n_nodes = -(-work.n_ranks // hardware.ranks_per_node)
    return Cadence(every, pause_s, written_s, plan.restart_s, plan.node_mtbf_hours * 3600 / n_nodes)


_PCIE_BYTES_PER_S = 20e9
"""Of a GPU's copy to pinned host memory, PCIe 4 or better; an assumption."""
