"""One source shared by several trainers: each batch is read and moved to the device once."""

from __future__ import annotations

import torch

from sae_core.training.source import ActivationSource, Batch
from sae_core.training.upload import Uploader


class SharedSource:
    """A source shared by the trainers of one rank; it moves batches to the trainers' device.

    Each trainer gets a view, which is an `ActivationSource` with its own position. Views may ask
    for batches in any order, but only the newest batch is kept. Trainers in lockstep
    (`sae_core.training.lockstep`) therefore cost one read and one transfer per batch, whatever
    their number.

    Args:
        source: Source that all trainers read.
        device: Device of the trainers.
    """

    def __init__(self, source: ActivationSource, device: torch.device) -> None:
        self.source = source
        self._device = device
        self._uploader = Uploader(device)
        self._newest: tuple[int, Batch] | None = None
        self._sample: tuple[int, torch.Tensor] | None = None

    def view(self) -> SharedSourceView:
        """Return a new view, positioned at batch 0."""
        return SharedSourceView(self)

    def batch(self, position: int) -> Batch:
        """Return batch `position` on the device. It is shared: do not modify it in place."""
        if self._newest is None or self._newest[0] != position:
            if self.source.position != position:
                self.source.seek(position)
            self._newest = (position, self._moved(self.source.next()))
        return self._newest[1]

    def sample(self, n: int) -> torch.Tensor:
        """Return the source's sample [n, d_in] on the device; kept until `clear_sample`."""
        if self._sample is None or self._sample[0] != n:
            self._sample = (n, self.source.sample(n).to(self._device))
        return self._sample[1]

    def clear_sample(self) -> None:
        """Free the sample; to be called once every view has used it."""
        self._sample = None

    def _moved(self, batch: Batch) -> Batch:
        if batch.target is None:
            (x,) = self._uploader.upload([batch.x])
            return batch._replace(x=x)
        x, target = self._uploader.upload([batch.x, batch.target])
        return batch._replace(x=x, target=target)


class SharedSourceView:
    """One trainer's view of a `SharedSource`: the same batches, with its own position."""

    def __init__(self, shared_source: SharedSource) -> None:
        source = shared_source.source
        self.d_in = source.d_in
        self.d_out = source.d_out
        self.identity = source.identity
        self._shared_source = shared_source
        self._position = 0

    @property
    def position(self) -> int:
        """Index of the next batch."""
        return self._position

    def sample(self, n: int) -> torch.Tensor:
        """Return the first `n` rows of the stream, [n, d_in], on the device."""
        return self._shared_source.sample(n)

    def seek(self, position: int) -> None:
        """Make `position` the next batch of this view."""
        self._position = position

    def next(self) -> Batch:
        """Return the batch at `position`, on the device, and advance by one."""
        batch = self._shared_source.batch(self._position)
        self._position += 1
        return batch
