"""One source that several trainers see: a batch is read and moved to the device once for all."""

from __future__ import annotations

import torch

from sae_core.source import ActivationSource, Batch


class FanOut:
    """Gives out views of a source, each an `ActivationSource` with a position of its own.

    Views may ask for batches in any order, but only the newest batch is held: trainers in lockstep
    (`sae_core.together`) cost one read and one transfer a batch, however many they are.

    Args:
        source: what all of them train on.
        device: where batches go.
    """

    def __init__(self, source: ActivationSource, device: torch.device) -> None:
        self.source, self._device = source, device
        self._newest: tuple[int, Batch] | None = None
        self._sample: tuple[int, torch.Tensor] | None = None

    def view(self) -> View:
        """A view that begins at batch 0."""
        return View(self)

    def batch(self, position: int) -> Batch:
        """Batch `position`, on the device; whoever gets it must not write to it."""
        if self._newest is None or self._newest[0] != position:
            if self.source.position != position:
                self.source.seek(position)
            self._newest = (position, self._moved(self.source.next()))
        return self._newest[1]

    def sample(self, n: int) -> torch.Tensor:
        """As the source gives it, on the device; held until `forget_sample`."""
        if self._sample is None or self._sample[0] != n:
            self._sample = (n, self.source.sample(n).to(self._device))
        return self._sample[1]

    def forget_sample(self) -> None:
        """Frees it: every view that wanted it has had it."""
        self._sample = None

    def _moved(self, batch: Batch) -> Batch:
        target = batch.target
        if target is not None:
            target = target.to(self._device, non_blocking=True)
        return Batch(batch.x.to(self._device, non_blocking=True), target, batch.first_row)


class View:
    """One trainer's sight of a `FanOut`."""

    def __init__(self, fan_out: FanOut) -> None:
        source = fan_out.source
        self.d_in, self.d_out, self.identity = source.d_in, source.d_out, source.identity
        self._fan_out, self._position = fan_out, 0

    @property
    def position(self) -> int:
        """Index of the next batch."""
        return self._position

    def sample(self, n: int) -> torch.Tensor:
        """[n, d_in] rows of the stream's beginning."""
        return self._fan_out.sample(n)

    def seek(self, position: int) -> None:
        """Makes batch `position` the next one of this view."""
        self._position = position

    def next(self) -> Batch:
        """The batch at `position`."""
        batch = self._fan_out.batch(self._position)
        self._position += 1
        return batch
