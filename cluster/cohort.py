"""The runs that one group of ranks trains at once on one stream: one, or several cells of a sweep.

Each has a folder, checkpoints, metrics and an end of its own, and the weights that it would have
alone. What fails one of them leaves the others going.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from activation_store import Store, open_store
from cluster.cursor import RunCursor
from cluster.metric_sinks import MetricSinks
from cluster.mixture_source import MixtureSource
from cluster.provenance import consumer_name
from cluster.row_share import RowShare
from cluster.source import WAIT_TIMEOUT_S, StoreSource
from cluster.sweep_config import SweepConfig
from cluster.sweep_record import write_record
from cluster.trainable import check_store, require_finite
from cluster.training_line import COSTS
from cluster.watchdog import Watchdog
from conf.schema import RunConfig
from sae_core.atomic import write_json
from sae_core.checkpoint import agreed_checkpoint
from sae_core.errors import DivergedError, NonFiniteLossError, SAEError
from sae_core.fan_out import FanOut
from sae_core.mesh import Mesh
from sae_core.together import Outcome, train_together
from sae_core.trainer import Trainer


@dataclass(frozen=True)
class Member:
    """One run of the group."""

    run_dir: Path
    config: RunConfig
    sinks: MetricSinks | None
    """Of rank 0."""
    limits: SweepConfig | None = None
    """When it has diverged; None where it is no cell of a sweep."""

    def report(self, row: dict[str, Any]) -> None:
        """Writes a row, and judges it: on all ranks alike, for they have the same numbers.

        Raises:
            DivergedError: the cell is to stop.
        """
        if self.sinks is not None:
            self.sinks.write(row)
        limits = self.limits
        if limits is None or limits.diverged_fvu is None:
            return
        if row["tokens"] > limits.diverged_grace_tokens and not row["fvu"] <= limits.diverged_fvu:
            raise DivergedError(
                f"FVU {row['fvu']:.4g} at step {row['step']}, above "
                f"sweep.diverged_fvu={limits.diverged_fvu:g}: delete the cell's folder and give it "
                "a lower learning rate, with sweep.overrides"
            )

    def record(self, error: SAEError) -> None:
        """Leaves word of what ended a cell, while the others still train."""
        if self.sinks is None or self.limits is None:
            return
        try:
            write_record(self.run_dir, error)
        except OSError as refused:  # a full disk: the cell stays open, the others go on
            print(f"sweep: {self.run_dir.name}: {error} ({refused})", file=sys.stderr, flush=True)


def train_members(
    members: list[Member],
    device: torch.device,
    stop_requested: Callable[[], bool],
    watchdog: Watchdog,
) -> list[Outcome]:
    """Trains all of them to their ends, from the newest valid checkpoint of each; collective.

    Args:
        members: their configs differ in `sae`, `optim`, `seed` and `train.tokens` at most.
        device: of this rank.
        stop_requested: see `Trainer`.
        watchdog: learns how far they have come.

    Raises:
        StoreError, ConfigError: the store does not serve them.
    """
    config = members[0].config
    mesh = Mesh.create(device.type, config.parallel.latent, config.parallel.data)
    store = open_store(config.store.path)
    array = check_store(config)
    source = _source(config, store, array, mesh, device)
    watchdog.waits = lambda: source.waits
    # Before the sample: what it reads must not be deleted by others meanwhile.
    cursor = _cursor(members[0], source) if isinstance(source, StoreSource) else None
    try:
        trainers: dict[int, Trainer] = {}
        outcomes: dict[int, Outcome] = {}
        # Each that is ready is progress: many take longer than one.
        watchdog.waits = lambda: source.waits + len(trainers) + len(outcomes)
        _make_ready(
            members, mesh, FanOut(source, device), array, stop_requested, trainers, outcomes
        )
        watchdog.waits = lambda: source.waits + sum(t.saver.waits for t in trainers.values())
        watchdog.training_begins(lambda: sum(trainer.step for trainer in trainers.values()))
        indices = list(trainers)
        ended = train_together(
            list(trainers.values()), lambda i, error: members[indices[i]].record(error)
        )
        outcomes |= dict(zip(indices, ended, strict=True))
        _look_for_the_cause(outcomes, store, array)
        for index, trainer in trainers.items():
            if members[index].sinks is not None:
                write_json(members[index].run_dir / COSTS, trainer.costs)
        if cursor is not None and outcomes[0].finished:
            source.seek(trainers[0].source.position)  # it may have resumed at its end
            cursor.finish()
        return [outcomes[index] for index in range(len(members))]
    finally:
        source.close()


def _make_ready(
    members: list[Member],
    mesh: Mesh,
    fan_out: FanOut,
    array: str,
    stop_requested: Callable[[], bool],
    trainers: dict[int, Trainer],
    outcomes: dict[int, Outcome],
) -> None:
    """Fills in calibrated or resumed trainers, and outcomes of those that cannot be, by index."""
    for index, member in enumerate(members):
        config, checkpoints = member.config, member.run_dir / "checkpoints"
        try:
            trainer = Trainer(
                replace(config.trainer, sae=replace(config.sae, hookpoint=array)),
                mesh,
                fan_out.view(),
                checkpoints,
                config.seed,
                report=member.report,
                report_every=config.logging.every_steps,
                stop_requested=stop_requested,
            )
            newest = agreed_checkpoint(checkpoints, config.checkpoint.verify_hashes)
            if newest is None:
                trainer.calibrate()
            else:
                trainer.resume(newest)
            trainers[index] = trainer
        except SAEError as error:  # the same on all ranks: of config, checkpoint or sample
            member.record(error)
            outcomes[index] = Outcome(False, error)
    fan_out.forget_sample()


def _source(
    config: RunConfig, store: Store, array: str, mesh: Mesh, device: torch.device
) -> StoreSource | MixtureSource:
    order = (
        array,
        config.seed,
        config.train.batch_tokens,
        mesh.data_rank,
        mesh.n_data,
        config.store.window_items,
        config.store.buffer_tokens,
        device,
    )
    share, order_seed = RowShare.of(mesh, config.train.timeout_s), config.store.order_seed
    if config.store.mixture:
        stores = [store, *map(open_store, config.store.paths[1:])]
        weights = config.store.weights
        return MixtureSource(stores, weights, *order, share=share, order_seed=order_seed)
    # The driver sees when a harvest beside the trainer fails, and ends the ranks.
    wait_timeout_s = math.inf if config.cluster.mode == "concurrent" else WAIT_TIMEOUT_S
    return StoreSource(store, *order, wait_timeout_s, share=share, order_seed=order_seed)


def _cursor(member: Member, source: StoreSource) -> RunCursor | None:
    """Of rank 0, on a growing store; a sweep waits until the store is whole."""
    config = member.config
    if member.sinks is None or config.cluster.mode != "concurrent":
        return None
    cursor = RunCursor(
        config.store.path,
        consumer_name(config, member.run_dir),
        source,
        member.run_dir / "checkpoints",
        keep_everything=config.cluster.retention == "keep",
    )
    source.before_next = cursor.publish
    return cursor


def _look_for_the_cause(outcomes: dict[int, Outcome], store: Store, array: str) -> None:
    """Rows that came after the start may be the cause, which says more than the loss does."""
    if any(isinstance(outcome.error, NonFiniteLossError) for outcome in outcomes.values()):
        store.refresh()
        require_finite(store, array)
