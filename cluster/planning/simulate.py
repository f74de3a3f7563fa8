"""A simulation of many ranks: steps with their collectives and stragglers, then the run's failures.

Time runs per rank. A computation moves a rank's clock; a collective sets the clocks of its group to
the latest of them plus its own time; reading runs one batch ahead on a clock of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cluster.planning.step_time import Phase

Clock = NDArray[np.float64]


@dataclass(frozen=True)
class Noise:
    """How ranks differ."""

    jitter: float
    """Standard deviation of a computation's time from step to step, as a share of it."""
    slow_ranks: float
    """Share of ranks that are slow all the time; at least one when it is above 0."""
    slow_factor: float
    """Times as long as the others."""


@dataclass(frozen=True)
class RunCost:
    """A run with failures."""

    seconds: float
    failures: int
    lost_s: float
    """Work done twice."""
    paused_s: float
    """For checkpoints."""


@dataclass(frozen=True)
class Cadence:
    """What surrounds the steps of a run."""

    save_every_steps: int
    pause_s: float
    """Training waits for the copy of a checkpoint."""
    write_s: float
    """Until it is on disk and counts; beside training, but a save waits for the one before."""
    restart_s: float
    """From a failure to the first step of the new attempt."""
    mtbf_s: float
    """Between failures of the whole job; infinite: there are none."""


def simulate_step(
    phases: Sequence[Phase],
    latent: int,
    data: int,
    noise: Noise,
    *,
    read_s: float = 0.0,
    steps: int = 50,
    seed: int = 0,
) -> float:
    """Seconds of a step in the mean over `steps`, on a mesh of `latent` x `data` ranks."""
    random = np.random.default_rng(seed)
    slow = _slow_factors(latent * data, noise, random).reshape(data, latent)
    clock: Clock = np.zeros((data, latent))
    loaded: Clock = np.zeros((data, latent))
    for _ in range(steps):
        loaded = loaded + read_s
        clock = np.maximum(clock, loaded)
        # A block is read while the one before is used: the reader waits for it to be begun.
        loaded = np.maximum(loaded, clock)
        for phase in phases:
            if phase.group is None:
                drawn = random.standard_normal((data, latent))
                factor = np.exp(noise.jitter * drawn - noise.jitter**2 / 2)
                clock = clock + phase.seconds * slow * factor
            else:
                clock = _latest(clock, phase.group) + phase.seconds
    return float(clock.max()) / steps


def simulate_run(n_steps: int, step_s: float, cadence: Cadence, seed: int = 0) -> RunCost:
    """A whole run: after a failure it goes on from the newest checkpoint that was written.

    Raises:
        ValueError: failures come so fast that it never gets on.
    """
    every, total = cadence.save_every_steps, n_steps
    # A save waits for the one before to be written.
    pause = max(cadence.pause_s, cadence.write_s - every * step_s)
    interval_s = every * step_s + pause
    random = np.random.default_rng(seed)
    done, elapsed, failures, lost = 0, 0.0, 0, 0.0
    while True:
        wanted = (total - done) * step_s + (total - done) // every * pause
        until_failure = float(random.exponential(cadence.mtbf_s))
        if until_failure >= wanted:
            saves = total // every
            return RunCost(elapsed + wanted, failures, lost, saves * pause)
        kept = int(max(0.0, until_failure - cadence.write_s) // interval_s) * every
        lost += until_failure - kept // every * interval_s
        done += kept
        failures += 1
        elapsed += until_failure + cadence.restart_s
        if failures > 100_000:
            raise ValueError(f"{failures} failures and {done} of {total} steps: it never gets on")


def _slow_factors(n_ranks: int, noise: Noise, random: np.random.Generator) -> Clock:
    """The same ranks are slow at every share that holds them: more stragglers contain fewer."""
    order = random.permutation(n_ranks)
    n_slow = int(np.ceil(noise.slow_ranks * n_ranks))
    factors = np.ones(n_ranks)
    factors[order[:n_slow]] = noise.slow_factor
    return factors


def _latest(clock: Clock, group: str) -> Clock:
    """[data, latent]: the group's latest clock, for all its members."""
    axis = {"latent": 1, "data": 0, "all": None}[group]
    latest = clock.max(axis=axis, keepdims=True)
    return np.broadcast_to(latest, clock.shape)
