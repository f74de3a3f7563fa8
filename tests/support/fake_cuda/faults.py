"""Faults that the fake CUDA device must find, each committed on purpose."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

from sae_core.kernels.interface import SparseLatents
from sae_core.kernels.keys import pool_width
from sae_core.kernels.triton import sparse
from sae_core.kernels.triton.encoder import select
from sae_core.training.upload import Uploader
from tests.support.fake_cuda.cases import ranks
from tests.support.fake_cuda.mode import FakeDevice
from tests.support.fake_cuda.record import Record


def _on_device(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="cuda")


def _pinned(*shape: int) -> torch.Tensor:
    return torch.empty(*shape, pin_memory=True)


WAITING: dict[str, tuple[str, Callable[[], object]]] = {
    "item": ("item", lambda: _on_device(1).item()),
    "truth value": ("item", lambda: bool(_on_device(1) > 0)),
    "float()": ("item", lambda: float(_on_device(3).sum())),
    "tolist": ("item", lambda: _on_device(3).tolist()),
    "nonzero": ("nonzero", lambda: _on_device(3).nonzero()),
    "where with one argument": ("nonzero", lambda: torch.where(_on_device(3) > 0)),
    "index by a mask": ("index by a mask", lambda: _on_device(3)[_on_device(3) > 0]),
    "assignment by a mask": (
        "assignment by a mask",
        lambda: _on_device(3).__setitem__(_on_device(3) > 0, _on_device(2)),
    ),
    "masked_select": (
        "masked_select",
        lambda: _on_device(3).masked_select(_on_device(3) > 0),
    ),
    "unique": ("unique", lambda: _on_device(3).unique()),
    "unique_consecutive": ("unique_consecutive", lambda: _on_device(3).unique_consecutive()),
    "repeat_interleave": (
        "repeat_interleave",
        lambda: _on_device(3).repeat_interleave(_on_device(3, dtype=torch.int64)),
    ),
    "bincount": ("bincount", lambda: _on_device(3, dtype=torch.int64).bincount()),
    "equal": ("equal", lambda: torch.equal(_on_device(3), _on_device(3))),
    "copy to pageable memory": ("copy to host", lambda: _on_device(3).cpu()),
    "copy into pageable memory": (
        "copy to host",
        lambda: torch.empty(3).copy_(_on_device(3), non_blocking=True),
    ),
    "blocking copy to pinned memory": ("copy to host", lambda: _pinned(3).copy_(_on_device(3))),
    "copy to every other number of pinned memory": (
        "copy to host",
        lambda: _pinned(6)[::2].copy_(_on_device(3), non_blocking=True),
    ),
    "copy from pageable memory": (
        "copy to device",
        lambda: torch.empty(3).to("cuda", non_blocking=True),
    ),
    "blocking copy from pinned memory": ("copy to device", lambda: _pinned(3).to("cuda")),
    "tensor from a number": ("copy to device", lambda: torch.tensor(3, device="cuda")),
    "tensor from a list": ("copy to device", lambda: torch.tensor([1.0, 2.0], device="cuda")),
    "new_tensor": ("copy to device", lambda: _on_device(3).new_tensor([1.0])),
    "index by a list": ("copy to device", lambda: _on_device(3)[[0, 2]]),
    "index on the host": (
        "copy of an index to device",
        lambda: _on_device(3)[torch.zeros(2, dtype=torch.int64)],
    ),
    "synchronize": ("torch.cuda.synchronize", lambda: torch.cuda.synchronize(None)),
    "stream.synchronize": (
        "Stream.synchronize",
        lambda: torch.cuda.current_stream().synchronize(),
    ),
    "event.synchronize": ("Event.synchronize", lambda: torch.cuda.Event().synchronize()),
    "deepspeed": ("torch.cuda.synchronize", lambda: _accelerator().synchronize()),
}
"""For each name, the expected `Wait.what` and the code that waits."""


def _accelerator() -> Any:
    from deepspeed.accelerator import get_accelerator

    return get_accelerator()


NOT_WAITING: dict[str, Callable[[], object]] = {
    "arithmetic": lambda: _on_device(3) * 2 + 1,
    "sort": lambda: _on_device(3).sort(stable=True),
    "topk": lambda: _on_device(8).topk(2),
    "number assigned by a mask": lambda: _on_device(3).__setitem__(_on_device(3) > 0, 1.0),
    "masked_fill": lambda: _on_device(3).masked_fill(_on_device(3) > 0, 1.0),
    "repeat_interleave to a known size": lambda: _on_device(3).repeat_interleave(
        _on_device(3, dtype=torch.int64), output_size=7
    ),
    "asynchronous copy from pinned memory": lambda: _pinned(3).to("cuda", non_blocking=True),
    "asynchronous copy to pinned memory": lambda: _pinned(3).copy_(
        _on_device(3), non_blocking=True
    ),
    "asynchronous copy to the host": lambda: _on_device(3).to("cpu", non_blocking=True),
    "scalar of the host": lambda: _on_device(3) * torch.tensor(2.0),
    "zeros": lambda: torch.zeros(3, device="cuda"),
    "event": lambda: torch.cuda.current_stream().wait_event(torch.cuda.Event()),
}


def waits(device: FakeDevice, name: str) -> Record:
    """Run one of `WAITING` or `NOT_WAITING` and return its record."""
    with device:
        WAITING[name][1]() if name in WAITING else NOT_WAITING[name]()
        return device.clear()


class _HostGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.sum()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> torch.Tensor:
        return grads[0] * torch.empty(3)


def _mixed_backward() -> None:
    loss: Any = _HostGradient.apply(_on_device(3).requires_grad_())
    loss.backward()


MIXING: dict[str, Callable[[], object]] = {
    "sum": lambda: _on_device(3) + torch.empty(3),
    "product": lambda: torch.empty(3, 3) @ _on_device(3, 3),
    "index on the host": lambda: _on_device(3).index_select(0, torch.zeros(2, dtype=torch.int64)),
    "index on the device": lambda: torch.empty(3)[_on_device(2, dtype=torch.int64)],
    "concatenation": lambda: torch.cat([_on_device(3), torch.empty(3)]),
    "backward": _mixed_backward,
}
"""For each name, code in which a tensor of the host meets one of the device."""


def mixes(device: FakeDevice, name: str) -> None:
    """Run one of `MIXING`, which raises MixedDevices."""
    with device:
        MIXING[name]()


def launch(
    device: FakeDevice,
    k: int = 32,
    width: int | None = None,
    counts: str = "int32",
    offset: int = 0,
    on: str = "cuda",
) -> Record:
    """Launch the selection of 64 rows and return the record.

    Args:
        device: The fake device.
        k: Number of keys to keep.
        width: Slots of a row's pool; None for the usual number.
        counts: Dtype of the numbers of keys.
        offset: Index of the first threshold in its memory.
        on: Device of the threshold.
    """
    rows = 64
    with device:
        pool = _on_device(rows, width or pool_width(k), dtype=torch.int64)
        number = torch.empty(rows, dtype=getattr(torch, counts), device="cuda")
        threshold = torch.empty(rows + offset, device=on)[offset:]
        select.select(pool, number, threshold, _on_device(rows, dtype=torch.int32), k)
        return device.clear()


def large_launch(device: FakeDevice, rows: int) -> Record:
    """Launch the selection with this number as its number of rows."""
    shape = select.select_shape(256, 32)
    with device:
        arguments = [
            _on_device(64, 256, dtype=torch.int64),
            _on_device(64, dtype=torch.int32),
            _on_device(64),
            _on_device(64, dtype=torch.int32),
        ]
        select.select_kernel[(math.ceil(64 / 4),)](*arguments, rows, 32, **shape)
        return device.clear()


def narrow_launch(device: FakeDevice) -> Record:
    """Decode 64 rows of one column."""
    with device:
        places = _on_device(64, dtype=torch.int64)
        active = SparseLatents(places, places, _on_device(64), places, places)
        sparse.decode(active, _on_device(64, 1))
        return device.clear()


def race(device: FakeDevice, ordered: bool) -> Record:
    """Copy on a second stream and use the copy on the first, ordered by an event or not."""
    with device:
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            copy = _pinned(3).to("cuda", non_blocking=True)
        if ordered:
            torch.cuda.current_stream().wait_stream(side)
        copy + 1
        return device.clear()


def upload(device: FakeDevice, ordered: bool) -> Record:
    """Upload twice and use the second upload; `ordered` is False without the stream's wait."""
    with device:
        uploader = Uploader(torch.device("cuda"))
        ignored = patch.object(torch.cuda.Stream, "wait_event", lambda self, event: None)
        with nullcontext() if ordered else ignored:
            uploader.upload([_pinned(3)])
            (found,) = uploader.upload([_pinned(3)])
        found + 1
        return device.clear()


def collective(device: FakeDevice, backend: str, on: str) -> Record:
    """Run an all-reduce of a tensor on `on` in a group of this backend."""
    with ranks(device, latent=2):
        group = dist.new_group(backend=backend)
        device.clear()
        dist.all_reduce(torch.empty(3, device=on), group=group)
        return device.clear()


def capture(device: FakeDevice, waiting: bool) -> Record:
    """Capture and replay a CUDA graph, with a wait or without one."""
    with device:
        x = _on_device(3)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = x * 2
            if waiting:
                y.sum().item()
        graph.replay()
        return device.clear()


def atomics(device: FakeDevice) -> Record:
    """Add floats at indices, in no fixed order."""
    with device:
        _on_device(3).index_add_(0, _on_device(2, dtype=torch.int64), _on_device(2))
        return device.clear()
