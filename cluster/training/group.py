"""Training group: the runs that one set of ranks trains concurrently from one row stream.

A group is one ordinary run, or several cells of a sweep. Each member has its own folder,
checkpoints and metrics, ends independently, and gets the same weights as if it were trained alone.
If one member fails, the others continue.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from activation_store import Store, open_store
from cluster.run_folder.files import CHECKPOINTS, COSTS, INPUTS, PREFILTER, consumer_name
from cluster.run_folder.sweep_record import write_record
from cluster.training.batch_order import BatchOrder
from cluster.training.metric_sinks import MetricSinks
from cluster.training.mixture_source import MixtureSource
from cluster.training.shared_reads import SharedReads
from cluster.training.store_checks import check_store, require_finite
from cluster.training.store_cursor import RunCursor
from cluster.training.store_source import WAIT_TIMEOUT_S, StoreSource
from cluster.training.watchdog import Watchdog
from conf.schema.run import RunConfig
from conf.schema.sweep import SweepConfig
from foundation.atomic_files import write_json
from foundation.errors import ConfigError, FoundryError
from sae_core.checkpoint import agreed_checkpoint
from sae_core.distributed.mesh import Mesh
from sae_core.errors import DivergedError, NonFiniteLossError, SAEError
from sae_core.kernels.prefilter_choice import PrefilterChoice
from sae_core.training.input_transform import InputReport
from sae_core.training.lockstep import Outcome, train_in_lockstep
from sae_core.training.shared_source import SharedSource
from sae_core.training.trainer import Trainer


@dataclass(frozen=True)
class Member:
    """One run of the training group."""

    run_dir: Path
    """The run's folder."""
    config: RunConfig
    """The run's config."""
    sinks: MetricSinks | None
    """Where rank 0 writes metrics. None on the other ranks."""
    limits: SweepConfig | None = None
    """Settings of the sweep, with the divergence limits. None if the run is not a sweep cell."""

    def report(self, row: dict[str, Any]) -> None:
        """Write a row of metrics and check it for divergence.

        All ranks have the same numbers and therefore make the same decision.

        Raises:
            DivergedError: If the FVU is above `sweep.diverged_fvu` or not finite.
        """
        if self.sinks is not None:
            self.sinks.write(row)
        limits = self.limits
        if limits is None or limits.diverged_fvu is None:
            return
        # Use `not <=` rather than `>`, so that NaN counts as diverged too.
        if row["tokens"] > limits.diverged_grace_tokens and not row["fvu"] <= limits.diverged_fvu:
            raise DivergedError(
                f"FVU {row['fvu']:.4g} at step {row['step']}: expected at most "
                f"sweep.diverged_fvu={limits.diverged_fvu:g}; delete the cell's folder and set a "
                "lower learning rate for the cell with sweep.overrides"
            )

    def record(self, error: FoundryError) -> None:
        """Write the error that ended a cell to its folder, while the other cells still train."""
        if self.sinks is None or self.limits is None:
            return
        try:
            write_record(self.run_dir, error)
        except OSError as refused:
            # The disk may be full. The cell stays unfinished; the other cells continue.
            print(
                f"sweep: {self.run_dir.name}: {error}; could not record this ({refused})",
                file=sys.stderr,
                flush=True,
            )


def train_members(
    members: list[Member],
    device: torch.device,
    stop_requested: Callable[[], bool],
    watchdog: Watchdog,
) -> list[Outcome]:
    """Train every member to its end from its newest valid checkpoint. Collective.

    Args:
        members: The runs. Their configs may differ only in `sae`, `optim`, `seed` and
            `train.tokens`.
        device: Device of this rank.
        stop_requested: See `Trainer`.
        watchdog: Watchdog of this rank, to which the members' progress is reported.

    Returns:
        The outcome of each member, in the order of `members`.

    Raises:
        StoreError: If the store cannot be read.
        ConfigError: If the store does not fit the config.
    """
    config = members[0].config
    mesh = Mesh.create(device.type, config.parallel.latent, config.parallel.data)
    store = open_store(config.store.path)
    array = check_store(config)
    with closing(_source(config, store, array, mesh, device)) as source:
        # Register before the calibration sample is read, so that its rows are not deleted in the
        # meantime.
        cursor = _cursor(members[0], source) if isinstance(source, StoreSource) else None
        shared_source = SharedSource(source, device)
        started: list[Trainer | FoundryError] = []
        # Count each started member as progress, because many members take longer to set up than
        # one.
        watchdog.waits = lambda: source.waits + len(started)
        for member in members:
            started.append(_start(member, mesh, shared_source, array, stop_requested))
        shared_source.clear_sample()
        trainers = {i: one for i, one in enumerate(started) if isinstance(one, Trainer)}
        outcomes = {
            i: Outcome(False, one) for i, one in enumerate(started) if not isinstance(one, Trainer)
        }
        watchdog.waits = lambda: source.waits + sum(t.saver.waits for t in trainers.values())
        watchdog.start_training(lambda: sum(trainer.step for trainer in trainers.values()))
        indices = list(trainers)
        ended = train_in_lockstep(
            list(trainers.values()), lambda i, error: members[indices[i]].record(error)
        )
        outcomes |= dict(zip(indices, ended, strict=True))
        _check_rows_after_nan(outcomes, store, array)
        for index, trainer in trainers.items():
            if members[index].sinks is not None:
                write_json(members[index].run_dir / COSTS, trainer.costs)
        if cursor is not None and outcomes[0].finished:
            # A run that resumed at its last step has read nothing, so the source is still at 0.
            source.seek(trainers[0].source.position)
            cursor.finish()
        return [outcomes[index] for index in range(len(members))]


def _start(
    member: Member,
    mesh: Mesh,
    shared_source: SharedSource,
    array: str,
    stop_requested: Callable[[], bool],
) -> Trainer | FoundryError:
    """Create a member's trainer, and calibrate it or resume it from a checkpoint. Collective.

    Returns:
        The trainer, or the error in its config, checkpoint or sample. The result is the same on all
        ranks.
    """
    config = member.config
    checkpoints = member.run_dir / CHECKPOINTS
    try:
        trainer = Trainer(
            replace(config.trainer, sae=replace(config.sae, hookpoint=array)),
            mesh,
            shared_source.view(),
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
        if member.sinks is not None:
            _record_prefilter(config.name, member.run_dir / PREFILTER, trainer.prefilter)
            _record_inputs(config, member.run_dir / INPUTS, trainer.inputs)
        return trainer
    except (SAEError, ConfigError) as error:
        member.record(error)
        return error


def _record_prefilter(name: str, path: Path, choice: PrefilterChoice | None) -> None:
    """Write a choice to the run folder, or remove one that no longer applies."""
    if choice is None:
        path.unlink(missing_ok=True)
        return
    print(f"{name}: {choice}", flush=True)
    write_json(path, asdict(choice))


def _record_inputs(config: RunConfig, path: Path, report: InputReport | None) -> None:
    """Print how the channels of the inputs differ, and write it to the run folder."""
    if report is None:
        return
    print(f"{config.name}: inputs: {report}", flush=True)
    transform = config.sae.input_transform
    proposal = report.proposal(transform)
    if proposal is not None:
        print(f"{config.name}: warning: {proposal}", file=sys.stderr, flush=True)
    if transform in ("per_channel", "whiten"):
        print(
            f"{config.name}: sae.input_transform={transform}: loss and FVU of the training log are "
            "those of the mapped activations; stage=evaluate measures raw ones",
            flush=True,
        )
    write_json(path, {**report._asdict(), "input_transform": transform, "proposal": proposal})


def _source(
    config: RunConfig, store: Store, array: str, mesh: Mesh, device: torch.device
) -> StoreSource | MixtureSource:
    """Open the row stream that all members share, from one store or a mixture of several."""
    order = BatchOrder(
        seed=config.seed,
        batch_tokens=config.train.batch_tokens,
        window_items=config.store.window_items,
        buffer_tokens=config.store.buffer_tokens,
        order_seed=config.store.order_seed,
        replica=mesh.data_rank,
        n_replicas=mesh.n_data,
    )
    shared_reads = SharedReads.for_mesh(mesh, config.train.timeout_s)
    if config.store.mixture:
        stores = [store, *map(open_store, config.store.paths[1:])]
        return MixtureSource(stores, config.store.weights, array, order, device, shared_reads)
    # In concurrent mode the driver stops the ranks if the harvest fails, so the ranks need no time
    # limit.
    wait_timeout_s = math.inf if config.cluster.mode == "concurrent" else WAIT_TIMEOUT_S
    return StoreSource(store, array, order, device, wait_timeout_s, shared_reads)


def _cursor(member: Member, source: StoreSource) -> RunCursor | None:
    """Register the run as a consumer of its growing store.

    Returns None on ranks other than 0, and if the store does not grow during training.
    """
    config = member.config
    if member.sinks is None or config.cluster.mode != "concurrent":
        return None
    cursor = RunCursor(
        config.store.path,
        consumer_name(config, member.run_dir),
        source,
        member.run_dir / CHECKPOINTS,
        keep_everything=config.cluster.retention == "keep",
    )
    source.before_next = cursor.publish
    return cursor


def _check_rows_after_nan(outcomes: dict[int, Outcome], store: Store, array: str) -> None:
    """Check the store for non-finite rows if a loss was not finite.

    Rows that were harvested after training started have not been checked yet. An error that names
    such rows is more helpful than an error about the loss.
    """
    if any(isinstance(outcome.error, NonFiniteLossError) for outcome in outcomes.values()):
        store.refresh()
        require_finite(store, array)
