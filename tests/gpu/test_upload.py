"""Test that an asynchronous copy to a GPU is complete before its host memory is reused."""

from __future__ import annotations

import pytest
import torch

from activation_store.reading.buffers import Recycler
from cluster.training.device_gather import to_torch
from sae_core.training.pinned_memory import pinned_on
from sae_core.training.upload import Uploader

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

N = 1 << 20


def test_pinned_memory_is_not_reused_during_its_copy() -> None:
    recycler = Recycler(pinned_on(torch.device("cuda", 0)))
    uploader = Uploader(torch.device("cuda"))
    uploaded = []
    for number in range(4):
        rows = recycler.empty((N,), "float32")  # reused as soon as nothing refers to it
        rows[:] = number
        torch.cuda._sleep(200_000_000)  # the copy waits for about 0.1 s of work on the device
        uploaded += uploader.upload([to_torch(rows)])
        del rows
    assert [one.unique().tolist() for one in uploaded] == [[0.0], [1.0], [2.0], [3.0]]
