"""Several trainers in lockstep on one stream; a single one is the case of one.

All ranks hold the same trainers in the same order and take the same decisions: what drops a trainer
(a loss that is not finite, one that diverges, a checkpoint that cannot be written) is told by
numbers that all ranks share, so no collective is left with a rank missing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sae_core.agreement import NOTHING, Agreed, Agreement
from sae_core.errors import CheckpointError, SAEError

if TYPE_CHECKING:
    from sae_core.trainer import Trainer


@dataclass(frozen=True)
class Outcome:
    """How training of one trainer has ended, the same on all ranks."""

    finished: bool
    """False where an error or a request to stop came before the last step."""
    error: SAEError | None = None


def train_together(
    trainers: Sequence[Trainer], failed: Callable[[int, SAEError], None] = lambda i, error: None
) -> list[Outcome]:
    """Trains all to their last step; collective. An error of one leaves the others going.

    Each step takes the batch that the hindmost trainers are at; those that resumed further ahead
    wait until the stream comes to them. So each sees the batches that it would see alone.

    Args:
        trainers: calibrated or resumed, on views of one `FanOut` if there are several.
        failed: called at once, on every rank, with the index of a trainer that an error ends.

    Returns:
        Of each, in their order. Where a request to stop came, their checkpoints are written.

    Raises:
        Anything but an SAEError, as from the stream: it ends all.
    """
    return _Lockstep(trainers, failed).run() if trainers else []


class _Lockstep:
    def __init__(
        self, trainers: Sequence[Trainer], failed: Callable[[int, SAEError], None]
    ) -> None:
        self._trainers, self._failed = list(trainers), failed
        self._errors: dict[int, SAEError] = {}
        timeout_s = max(trainer.config.train.timeout_s for trainer in trainers)
        self._agreement = Agreement(timeout_s)

    def run(self) -> list[Outcome]:
        agreed = NOTHING
        while (going := self._going()) and not agreed.stop:
            position = min(trainer.source.position for trainer in going)
            now = [trainer for trainer in going if trainer.source.position == position]
            for trainer in now:
                self._guarded(trainer, trainer.take_step)
            agreed = self._agree(now)
            for trainer in now:
                self._guarded(trainer, trainer.save_if_due, agreed.save or agreed.stop)
        for index, trainer in enumerate(self._trainers):
            if index in self._errors:
                with suppress(CheckpointError):  # what it began to save before was good
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
        """Does it unless the trainer has failed; what it raises fails this one alone."""
        index = self._trainers.index(trainer)
        if index in self._errors:
            return
        try:
            action(*arguments)
        except SAEError as error:
            self._errors[index] = error
            self._failed(index, error)

    def _agree(self, stepped: list[Trainer]) -> Agreed:
        """What all ranks do after this step; nothing, but about once a second."""
        if not self._agreement.after_step():
            return NOTHING
        trainers = [t for i, t in enumerate(self._trainers) if i not in self._errors]
        agreed = self._agreement.exchange(
            any(trainer.stop_requested() for trainer in trainers),
            any(trainer.save_overdue for trainer in stepped),  # others have nothing new to save
            any(trainer.saver.failed for trainer in trainers),
        )
        if agreed.failed:
            for trainer in trainers:
                # Raises where the save failed: all ranks voted on the same outcome.
                self._guarded(trainer, trainer.saver.wait)
        return agreed
