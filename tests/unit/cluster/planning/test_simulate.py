"""Test properties of the simulation that hold for any numbers."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.planning.hardware import Link, gpu
from cluster.planning.scaling import grown, weak_scaling
from cluster.planning.simulate import Cadence, Noise, simulate_run, simulate_step
from cluster.planning.step_time import Phase, compute_seconds, step_seconds
from conf.schema.plan import PlanConfig
from conf.schema.run import RunConfig
from foundation.errors import ConfigError
from sae_core.config import ParallelConfig, TopKConfig, TrainConfig

PHASES = [
    Phase("encode", None, 0.05),
    Phase("select", "latent", 0.002),
    Phase("decode", None, 0.02),
    Phase("flag", "all", 0.001),
    Phase("exchange", "data", 0.003),
    Phase("update", None, 0.01),
]
FREE = [replace(phase, seconds=phase.seconds if phase.group is None else 0.0) for phase in PHASES]
QUIET = Noise(0.0, 0.0, 1.0)
CADENCE = Cadence(10, 0.0, 0.0, 5.0, math.inf)


def test_without_stragglers_and_link_times_nothing_is_lost():
    assert simulate_step(FREE, 64, 4, QUIET) == pytest.approx(compute_seconds(PHASES))


def test_without_stragglers_a_step_is_the_sum_of_its_phases():
    assert simulate_step(PHASES, 8, 4, QUIET) == pytest.approx(step_seconds(PHASES))


@settings(max_examples=25, deadline=None)
@given(
    st.floats(0, 1),
    st.floats(0, 1),
    st.floats(1, 3),
    st.floats(1, 3),
    st.integers(0, 9),
    st.sampled_from([(1, 8), (8, 1), (4, 4)]),
)
def test_more_stragglers_are_never_faster(share, more, factor, slower, seed, mesh):
    def step(slow_ranks, slow_factor):
        noise = Noise(0.05, slow_ranks, slow_factor)
        latent, data = mesh
        return simulate_step(PHASES, latent, data, noise, steps=5, seed=seed)

    shares, factors = sorted((share, more)), sorted((factor, slower))
    assert step(shares[0], factors[0]) <= step(shares[1], factors[1]) + 1e-12


def test_one_slow_rank_delays_all():
    slow = simulate_step(FREE, 8, 8, Noise(0.0, 1e-6, 1.5))
    assert slow == pytest.approx(1.5 * simulate_step(FREE, 8, 8, QUIET))


def test_a_rank_waits_only_for_its_own_group():
    """A slow rank delays only its own latent group if the groups exchange nothing."""
    within = [Phase("encode", None, 1.0), Phase("select", "latent", 0.0)]
    steps = [simulate_step(within, 2, 64, Noise(0.5, 0.0, 1.0), steps=20) for _ in range(2)]
    across = [Phase("encode", None, 1.0), Phase("flag", "all", 0.0)]
    assert steps[0] == steps[1]
    assert steps[0] < 0.8 * simulate_step(across, 2, 64, Noise(0.5, 0.0, 1.0), steps=20)


def test_reading_is_hidden_until_it_takes_longer_than_a_step():
    step_s = step_seconds(PHASES)
    assert simulate_step(PHASES, 2, 2, QUIET, read_s=step_s / 2, steps=200) == pytest.approx(
        step_s, rel=0.01
    )
    bound = simulate_step(PHASES, 2, 2, QUIET, read_s=3 * step_s, steps=200)
    assert bound == pytest.approx(3 * step_s, rel=0.01)


def test_a_run_without_failures_is_its_steps_and_pauses():
    cost = simulate_run(100, 1.0, replace(CADENCE, pause_s=0.5))
    assert (cost.seconds, cost.failures, cost.lost_s) == (105.0, 0, 0.0)


def test_a_save_waits_for_the_previous_one():
    cost = simulate_run(100, 1.0, replace(CADENCE, write_s=30.0))
    assert cost.paused_s == 10 * 20.0


def test_failures_cost_half_a_cadence_and_a_restart():
    """Each failure loses the work since the last checkpoint, on average half an interval."""
    cadence = replace(CADENCE, save_every_steps=100, mtbf_s=2000.0, restart_s=5.0)
    cost = simulate_run(1_000_000, 1.0, cadence)
    assert cost.failures == pytest.approx(1_000_000 * 1.025 / 2000, rel=0.15)
    assert cost.lost_s / cost.failures == pytest.approx(50, rel=0.1)
    assert cost.seconds == pytest.approx(1_000_000 + cost.lost_s + 5.0 * cost.failures)


def test_a_denser_cadence_loses_less_and_a_slower_write_more():
    cadence = replace(CADENCE, save_every_steps=100, mtbf_s=2000.0)
    lost = simulate_run(200_000, 1.0, cadence).lost_s
    assert simulate_run(200_000, 1.0, replace(cadence, save_every_steps=20)).lost_s < lost / 2
    assert simulate_run(200_000, 1.0, replace(cadence, write_s=80.0)).lost_s > 1.5 * lost


def test_a_run_without_progress_is_an_error():
    with pytest.raises(ValueError, match=r"the run makes no progress"):
        simulate_run(10**6, 1.0, replace(CADENCE, save_every_steps=10**5, mtbf_s=1.0))


def config_of(latent=8, data=1, **plan) -> RunConfig:
    return RunConfig(
        sae=TopKConfig(n_latents=1 << 17, k=32),
        train=TrainConfig(tokens=10**9, batch_tokens=8192, device="cuda"),
        parallel=ParallelConfig(latent, data),
        plan=PlanConfig(hardware="h100", **plan),
    )


def test_a_rank_keeps_its_share():
    latents = grown(config_of(), 64)
    assert (latents.sae.n_latents, latents.parallel.latent) == (1 << 20, 64)
    batch = grown(config_of(grow="batch"), 64)
    assert (batch.train.batch_tokens, batch.parallel.data) == (8 * 8192, 8)
    assert batch.sae.n_latents == 1 << 17
    with pytest.raises(ConfigError, match=r"plan\.simulate_ranks"):
        grown(config_of(grow="batch"), 12)


def test_an_ideal_machine_has_efficiency_one():
    free = Link(math.inf, math.inf, math.inf, 0.0)
    hardware = replace(gpu(config_of().plan), node=free, network=free, disk_bytes_per_s=math.inf)
    ideal = config_of(simulate_ranks=[64], jitter=0.0, slow_ranks=0.0, node_mtbf_hours=1e12)
    (row,) = weak_scaling(ideal, 4096, hardware)
    assert row.step_efficiency == pytest.approx(1, abs=0.02)  # a microsecond for each peer
    assert row.failures == 0


def test_latents_scale_better_than_the_batch():
    """Latent shards never send weights; replicas send every row to every other replica."""
    ranks = [8, 512]
    latents, batch = (
        weak_scaling(config_of(grow=grow, simulate_ranks=ranks), 4096, gpu(config_of().plan))
        for grow in ("latents", "batch")
    )
    for rows in (latents, batch):
        assert all(0 < row.run_efficiency <= row.step_efficiency <= 1 for row in rows)
        assert rows[1].step_efficiency < rows[0].step_efficiency
    assert latents[1].step_efficiency > batch[1].step_efficiency
