"""Streams and events of the fake device, which know what each of them is ordered after."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

Clock = dict[int, int]
"""For each stream, the number of its operations that are complete."""


class StreamOrder:
    """Vector clocks: which operations of the streams are known to come after which.

    Args:
        library: The loaded `device.cpp`, which holds each thread's current stream.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self._clocks: dict[int, Clock] = {}
        self._host: Clock = {}
        self._writes: dict[StorageWeakRef, tuple[int, int]] = {}
        self._reads: dict[StorageWeakRef, Clock] = {}

    @property
    def current(self) -> int:
        """Number of the calling thread's current stream; 0 is the default stream."""
        return int(self._library.fake_cuda_current_stream())

    def exchange(self, stream: int) -> int:
        """Make a stream the calling thread's current one, and return the one before."""
        return int(self._library.fake_cuda_exchange_stream(stream))

    def clock(self, stream: int) -> Clock:
        """Return what the next operation of a stream comes after."""
        return dict(self._clocks.get(stream, {}))

    def everything(self) -> Clock:
        """Return what an operation would come after if it waited for all streams."""
        clock: Clock = {}
        for stream in list(self._clocks):
            _merge(clock, self._clocks[stream])
        return clock

    def wait(self, stream: int, clock: Clock) -> None:
        """Let all further operations of a stream come after a clock."""
        _merge(self._clocks.setdefault(stream, {}), clock)

    def wait_on_host(self, clock: Clock) -> None:
        """Let everything that the host does from now on come after a clock."""
        _merge(self._host, clock)

    def run(self, read: list[torch.Tensor], written: list[torch.Tensor]) -> list[str]:
        """Add one operation to the current stream.

        Args:
            read: Tensors on the device that the operation reads.
            written: Tensors on the device that it writes.

        Returns:
            For each access that may overlap another stream's work, a description.
        """
        stream = self.current
        own = self._clocks.setdefault(stream, {})
        _merge(own, self._host)
        now = own[stream] = own.get(stream, 0) + 1
        races = []
        for tensor in (*read, *written):
            storage = StorageWeakRef(tensor.untyped_storage())
            other, number = self._writes.get(storage, (stream, 0))
            if own.get(other, 0) < number:
                races.append(f"stream {stream} uses what stream {other} may still be writing")
        for tensor in written:
            storage = StorageWeakRef(tensor.untyped_storage())
            for other, number in self._reads.pop(storage, {}).items():
                if own.get(other, 0) < number:
                    races.append(f"stream {stream} overwrites what stream {other} may still read")
            self._writes[storage] = (stream, now)
        for tensor in read:
            storage = StorageWeakRef(tensor.untyped_storage())
            self._reads.setdefault(storage, {})[stream] = now
        if now % 512 == 0:
            self._forget()
        return races

    def _forget(self) -> None:
        """Drop the storages that no longer exist."""
        for table in (self._writes, self._reads):
            for storage in [one for one in table if one.expired()]:
                table.pop(storage)


def _merge(clock: Clock, other: Clock) -> None:
    for stream, number in other.items():
        clock[stream] = max(clock.get(stream, 0), number)


def make_classes(order: StreamOrder, waited: Callable[[str], None]) -> tuple[Any, Any]:
    """Return stand-ins for `torch.cuda.Stream` and `torch.cuda.Event`.

    Args:
        order: Order of the streams' operations.
        waited: Called with the name of each method in which the host waits.
    """

    class Stream(torch.Stream):
        def __new__(cls, device: Any = None, priority: int = 0, **kwargs: Any) -> Stream:
            known = {"stream_id", "device_index", "device_type"} & kwargs.keys()
            if known:
                return torch.Stream.__new__(cls, **kwargs)
            return torch.Stream.__new__(cls, device="cuda", priority=priority)

        @property
        def cuda_stream(self) -> int:
            return self.stream_id

        def wait_event(self, event: Any) -> None:
            order.wait(self.stream_id, event.clock)

        def wait_stream(self, stream: Any) -> None:
            order.wait(self.stream_id, order.clock(stream.stream_id))

        def record_event(self, event: Any = None) -> Any:
            event = event or Event()
            event.record(self)
            return event

        def query(self) -> bool:
            return False

        def synchronize(self) -> None:
            waited("Stream.synchronize")
            order.wait_on_host(order.clock(self.stream_id))

    class Event:
        def __init__(self, *_: Any, **__: Any) -> None:
            self.clock: Clock = {}
            self._recorded = False

        def record(self, stream: Any = None) -> None:
            self.clock = order.clock(order.current if stream is None else stream.stream_id)
            self._recorded = True

        def wait(self, stream: Any = None) -> None:
            order.wait(order.current if stream is None else stream.stream_id, self.clock)

        def query(self) -> bool:
            # The slowest device: nothing that was recorded is ever complete by itself.
            return not self._recorded

        def synchronize(self) -> None:
            waited("Event.synchronize")
            order.wait_on_host(self.clock)

        def elapsed_time(self, end: Any) -> float:
            waited("Event.elapsed_time")
            return 1.0

    return Stream, Event


@contextmanager
def current(order: StreamOrder, stream: Any) -> Iterator[None]:
    """Run a block on a stream, like `torch.cuda.stream`."""
    if stream is None:
        yield
        return
    before = order.exchange(stream.stream_id)
    try:
        yield
    finally:
        order.exchange(before)
