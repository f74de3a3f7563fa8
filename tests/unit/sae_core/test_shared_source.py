"""Test that the shared source moves each batch once, for all of its views."""

from __future__ import annotations

import torch

from sae_core.training.shared_source import SharedSource
from sae_core.training.source import Batch

ELSEWHERE = torch.device("meta")
"""A device that every machine has; its tensors hold no numbers."""


class Transcoding:
    """A source on the host whose batches have a target."""

    d_in, d_out = 2, 3
    identity = "transcoding"

    def __init__(self) -> None:
        self.position = 0

    def sample(self, n: int) -> torch.Tensor:
        return torch.zeros(n, 2)

    def seek(self, position: int) -> None:
        self.position = position

    def next(self) -> Batch:
        self.position += 1
        return Batch(torch.zeros(4, 2), torch.zeros(4, 3), 4 * (self.position - 1))


def test_inputs_targets_and_the_sample_are_moved_once_for_all_views() -> None:
    shared_source = SharedSource(Transcoding(), ELSEWHERE)
    one, other = shared_source.view(), shared_source.view()
    for number in range(2):
        batch = one.next()
        assert batch.target is not None and batch.first_row == 4 * number
        assert batch.x.device == batch.target.device == ELSEWHERE
        assert (batch.x.shape, batch.target.shape) == ((4, 2), (4, 3))
        again = other.next()
        assert again.x is batch.x and again.target is batch.target
    assert one.sample(5).device == ELSEWHERE
    assert one.sample(5) is other.sample(5)


def test_tensors_that_are_there_already_are_not_copied() -> None:
    source = Transcoding()
    x = torch.zeros(4, 2)
    source.next = lambda: Batch(x, None, 0)  # type: ignore[method-assign]
    assert SharedSource(source, torch.device("cpu")).view().next().x is x
