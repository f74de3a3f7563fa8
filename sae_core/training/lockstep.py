"""The training loop: one trainer, or several in lockstep on one stream.

All ranks hold the same trainers in the same order and make the same decisions. A trainer is dropped
if its loss is not finite, if it diverges, or if a checkpoint could not be written. Each of these is
decided from values that all ranks share, so that no rank is missing from a collective.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from foundation.errors import FoundryError
from sae_core.distributed.agreement import Agreement, Flags
from sae_core.errors import CheckpointError, SAEError
from sae_core.training.trainer import Trainer


@dataclass(frozen=True)
class Outcome:
    """The outcome of training for one trainer; the same on all ranks."""

    finished: bool
    """False if an error or a request to stop came before the last step."""
    error: FoundryError | None = None
    """The error that ended this trainer, if any."""


def train_in_lockstep(
    trainers: Sequence[Trainer], failed: Callable[[int, SAEError], None] = lambda i, error: None
) -> list[Outcome]:
    """Train all trainers to their last step; collective over all ranks.

    Each step uses the earliest batch that an unfinished trainer still needs. Trainers that resumed
    further ahead wait until the stream reaches their next batch. Each trainer thus sees the same
    batches as when it is trained alone. An error of one trainer does not stop the others.

    Args:
        trainers: Calibrated or resumed trainers; several share one `SharedSource`.
        failed: Called on every rank, with the trainer's index and the error, as soon as an error
            has ended a trainer.

    Returns:
        One outcome per trainer, in the same order. After a request to stop, the checkpoints have
        been written by the time this returns.

    Raises:
        Exception: Any error other than an SAEError, such as an error of the stream. It ends the
            training of all trainers.
    """
    return _Lockstep(trainers, failed).run() if trainers else []


def train_to_end(trainer: Trainer) -> bool:
    """Train one SAE to its last step, saving on the way and at the end; collective.

    Returns:
        False if a request to stop ended training before the last step; a checkpoint has then been
        written.

    Raises:
        NonFiniteLossError: If a loss or gradient was not finite; no weight was updated with it.
        CheckpointError: If a checkpoint could not be written.
    """
    (outcome,) = train_in_lockstep([trainer])
    if outcome.error is not None:
        raise outcome.error
    return outcome.finished


class _Lockstep:
    def __init__(
        self, trainers: Sequence[Trainer], failed: Callable[[int, SAEError], None]
    ) -> None:
        self._trainers = list(trainers)
        self._failed = failed
        self._errors: dict[int, SAEError] = {}
        timeout_s = max(trainer.config.train.timeout_s for trainer in trainers)
        self._agreement = Agreement(timeout_s)

    def run(self) -> list[Outcome]:
        agreed = Flags()
        while (going := self._going()) and not agreed.stop:
            position = min(trainer.source.position for trainer in going)
            stepping = [trainer for trainer in going if trainer.source.position == position]
            for trainer in stepping:
                self._guarded(trainer, trainer.take_step)
            agreed = self._agree(stepping)
            for trainer in stepping:
                self._guarded(trainer, trainer.save_if_due, agreed.save or agreed.stop)
        for index, trainer in enumerate(self._trainers):
            if index in self._errors:
                # Let a save that began before the error finish: its weights were still good.
                with suppress(CheckpointError):
                    trainer.end()
            else:
                self._guarded(trainer, trainer.end)
        errors = [self._errors.get(i) for i in range(len(self._trainers))]
        return [
            Outcome(trainer.is_done and error is None, error)
            for trainer, error in zip(self._trainers, errors, strict=True)
        ]

    def _going(self) -> list[Trainer]:
        return [
            trainer
            for i, trainer in enumerate(self._trainers)
            if i not in self._errors and not trainer.is_done
        ]

    def _guarded(self, trainer: Trainer, action: Callable[..., None], *arguments: bool) -> None:
        """Run an action unless the trainer has failed; an SAEError ends this trainer only."""
        index = self._trainers.index(trainer)
        if index in self._errors:
            return
        try:
            action(*arguments)
        except SAEError as error:
            self._errors[index] = error
            self._failed(index, error)

    def _agree(self, stepped: list[Trainer]) -> Flags:
        """Exchange flags with all ranks about once a second; between exchanges, no flag is set."""
        if not self._agreement.is_due_after_step():
            return Flags()
        trainers = [t for i, t in enumerate(self._trainers) if i not in self._errors]
        own = Flags(
            stop=any(trainer.stop_requested() for trainer in trainers),
            # The trainers that did not step have nothing new to save.
            save=any(trainer.save_overdue for trainer in stepped),
            save_failed=any(trainer.saver.failed for trainer in trainers),
        )
        agreed = self._agreement.exchange(own)
        if agreed.save_failed:
            for trainer in trainers:
                # Raises for each trainer whose save failed, on all ranks: they voted on it.
                self._guarded(trainer, trainer.saver.wait)
        return agreed
