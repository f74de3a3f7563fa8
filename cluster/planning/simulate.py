"""Simulation of many ranks: steps with collectives and stragglers, and a run with failures.

Every rank has a clock. A computation advances the clock of its rank. A collective sets all clocks
of its group to the latest clock in the group plus the collective's duration. Reading runs one batch
ahead, on a separate clock.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cluster.planning.step_time import Phase

Clock = NDArray[np.float64]
"""Seconds on each rank's clock, [data, latent]."""


@dataclass(frozen=True)
class Noise:
    """Differences between ranks and between steps."""

    jitter: float
    """Standard deviation of a computation's time between steps, as a share of the mean time."""
    slow_ranks: float
    """Share of ranks that are permanently slow: at least one rank if the share is above 0."""
    slow_factor: float
    """Time of a computation on a slow rank, as a multiple of the time on other ranks."""


@dataclass(frozen=True)
class RunCost:
    """Time of a run with failures."""

    seconds: float
    """Duration of the whole run."""
    failures: int
    """Number of failures."""
    lost_s: float
    """Seconds of work that was lost in failures and repeated."""
    paused_s: float
    """Seconds for which training waited for checkpoints."""


@dataclass(frozen=True)
class Cadence:
    """Frequency and cost of checkpoints and failures."""

    save_every_steps: int
    """Steps between two checkpoints."""
    pause_s: float
    """Seconds for which training waits while a checkpoint is copied."""
    write_s: float
    """Seconds until a checkpoint is on disk and usable. Training continues meanwhile, but the next
    save waits for it."""
    restart_s: float
    """Seconds from a failure to the first step of the new attempt."""
    mtbf_s: float
    """Mean seconds between failures of the whole job, or infinity if there are none."""


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
    """Return the mean seconds of a step on a mesh of `latent` x `data` ranks.

    Args:
        phases: Computations and collectives of a step, in order.
        latent: Number of ranks in a latent group.
        data: Number of data replicas.
        noise: Differences between ranks.
        read_s: Seconds for reading a batch.
        steps: Number of steps to simulate.
        seed: Seed of the random numbers.
    """
    random = np.random.default_rng(seed)
    slow = _slow_factors(latent * data, noise, random).reshape(data, latent)
    clock: Clock = np.zeros((data, latent))
    loaded: Clock = np.zeros((data, latent))
    for _ in range(steps):
        loaded = loaded + read_s
        clock = np.maximum(clock, loaded)
        # A batch is read while the previous batch is used, so its read starts no earlier than that
        # use.
        loaded = np.maximum(loaded, clock)
        for phase in phases:
            if phase.group is None:
                # A log-normal factor with mean 1.
                drawn = random.standard_normal((data, latent))
                factor = np.exp(noise.jitter * drawn - noise.jitter**2 / 2)
                clock = clock + phase.seconds * slow * factor
            else:
                clock = _latest(clock, phase.group) + phase.seconds
    return float(clock.max()) / steps


def simulate_run(n_steps: int, step_s: float, cadence: Cadence, seed: int = 0) -> RunCost:
    """Simulate a whole run. After each failure it resumes from the newest written checkpoint.

    Args:
        n_steps: Number of steps in the run.
        step_s: Seconds of a step.
        cadence: Frequency and cost of checkpoints and failures.
        seed: Seed of the random numbers.

    Raises:
        ValueError: If failures are so frequent that the run makes no progress.
    """
    every = cadence.save_every_steps
    total = n_steps
    # A save waits until the previous one has been written.
    pause = max(cadence.pause_s, cadence.write_s - every * step_s)
    interval_s = every * step_s + pause
    random = np.random.default_rng(seed)
    done = 0
    elapsed = 0.0
    failures = 0
    lost = 0.0
    while True:
        # Seconds that the remaining steps and saves would take if there were no further failure.
        wanted = (total - done) * step_s + (total - done) // every * pause
        until_failure = float(random.exponential(cadence.mtbf_s))
        if until_failure >= wanted:
            saves = total // every
            return RunCost(elapsed + wanted, failures, lost, saves * pause)
        # Steps up to the last checkpoint that was on disk at the failure. Later steps are repeated.
        kept = int(max(0.0, until_failure - cadence.write_s) // interval_s) * every
        lost += until_failure - kept // every * interval_s
        done += kept
        failures += 1
        elapsed += until_failure + cadence.restart_s
        if failures > 100_000:
            raise ValueError(
                f"{failures} failures after {done} of {total} steps: the run makes no progress; "
                "save more often or use fewer ranks"
            )


def _slow_factors(n_ranks: int, noise: Noise, random: np.random.Generator) -> Clock:
    """Draw the slow ranks at random and return each rank's time factor, [n_ranks].

    With the same random numbers, the slow ranks of a larger share include those of a smaller share.
    """
    order = random.permutation(n_ranks)
    n_slow = int(np.ceil(noise.slow_ranks * n_ranks))
    factors = np.ones(n_ranks)
    factors[order[:n_slow]] = noise.slow_factor
    return factors


def _latest(clock: Clock, group: str) -> Clock:
    """Return the latest clock of each rank's group, [data, latent]."""
    axis = {"latent": 1, "data": 0, "all": None}[group]
    latest = clock.max(axis=axis, keepdims=True)
    return np.broadcast_to(latest, clock.shape)
