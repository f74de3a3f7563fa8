"""Simulated weak scaling: the plan with other numbers of ranks, and the same work per rank."""

from __future__ import annotations

from dataclasses import replace

from cluster.planning.hardware import Hardware
from cluster.planning.mesh_search import Layout, plan_layout
from cluster.planning.simulate import Cadence, Noise, simulate_run, simulate_step
from cluster.planning.step_time import compute_seconds
from cluster.planning.tables import Simulated
from conf.schema.run import RunConfig
from foundation.errors import ConfigError
from sae_core.config import ParallelConfig

_RANKS = (8, 16, 64, 256, 1024, 4096)


def weak_scaling(config: RunConfig, d_model: int, hardware: Hardware) -> list[Simulated]:
    """Simulate the plan at each of `plan.simulate_ranks`.

    The default is every number of ranks in `_RANKS` to which the mesh can be scaled.

    Raises:
        ConfigError: If the plan's mesh does not scale to one of `plan.simulate_ranks`.
    """
    planned = plan_layout(config, d_model, hardware, config.parallel)
    share_s = compute_seconds(planned.phases)
    ranks = config.plan.simulate_ranks or [n for n in _RANKS if _is_scalable(config, n)]
    return [_at(config, d_model, hardware, n, share_s) for n in ranks]


def _is_scalable(config: RunConfig, n_ranks: int) -> bool:
    try:
        grown(config, n_ranks)
    except ConfigError:
        return False
    return True


def grown(config: RunConfig, n_ranks: int) -> RunConfig:
    """Return the config for `n_ranks`, with dictionary or batch scaled to keep each rank's share.

    Raises:
        ConfigError: If the scaled mesh does not divide the dictionary or batch evenly.
    """
    mesh = config.parallel
    latents = config.plan.grow == "latents"
    fixed = mesh.data if latents else mesh.latent
    grows = mesh.latent if latents else mesh.data
    total = config.sae.n_latents if latents else config.train.batch_tokens
    part, left = divmod(n_ranks, fixed)
    if left or part < 1 or total * part % grows:
        raise ConfigError(
            "plan.simulate_ranks",
            n_ranks,
            f"multiples of parallel.{'data' if latents else 'latent'}={fixed} at which a rank's "
            "share is a whole number",
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
    """Simulate the plan with `n_ranks` ranks.

    Args:
        config: Config of the planned run.
        d_model: Width of the activations.
        hardware: Hardware of one rank.
        n_ranks: Number of ranks to simulate.
        share_s: Seconds of a rank's computations in the plan, used as the reference for efficiency.
    """
    scaled = grown(config, n_ranks)
    plan = config.plan
    layout = plan_layout(scaled, d_model, hardware, scaled.parallel)
    noise = Noise(plan.jitter, plan.slow_ranks, plan.slow_factor)
    mesh = scaled.parallel
    # Work that every replica repeats is not useful work. If more shards leave a rank with less to
    # compute, the difference must not count as higher efficiency.
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
    # Use the plan's own number of steps even if the batch has grown.
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
    """Return how often the run saves checkpoints and what saving costs.

    A save is due after `every_tokens` or `every_minutes`, whichever comes first.
    """
    checkpoint = config.checkpoint
    plan = config.plan
    work = layout.work
    every = max(1, checkpoint.every_tokens // config.train.batch_tokens)
    if checkpoint.every_minutes is not None:
        every = min(every, max(1, int(60 * checkpoint.every_minutes / step_s)))
    ranks = min(work.n_ranks, hardware.ranks_per_node)
    saved = 2 * work.matrix * (4 + 2 * work.moment_bytes) / work.data
    written_s = saved * ranks / hardware.disk_bytes_per_s
    bus = _PCIE_BYTES_PER_S if work.on_gpu else hardware.rates.stream_bytes / ranks
    # Training waits for the copy, and for the bytes that the host has no memory to copy.
    pause_s = saved / bus + layout.blocking_bytes * ranks / hardware.disk_bytes_per_s
    n_nodes = -(-work.n_ranks // hardware.ranks_per_node)
    return Cadence(every, pause_s, written_s, plan.restart_s, plan.node_mtbf_hours * 3600 / n_nodes)


_PCIE_BYTES_PER_S = 20e9
"""Assumed speed of a copy from a GPU to pinned host memory, with PCIe 4 or better."""
