"""Our calls in the store benchmark, and the yardsticks: the same work done on raw files."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from activation_store import CODECS, ShuffledStream, StagedStream, verify_store
from benchmarks.store.data import ARRAY, BASELINE, BATCH_ROWS, BF16, BUFFER_BYTES, Data, writer

Calls = dict[tuple[str, str], Callable[[], object]]
_READ_BYTES = 8 << 20


def read_calls(data: Data) -> Calls:
    """Return calls that each read all rows once, the yardstick first."""
    calls: Calls = {("raw file", "memmap copy"): _memmap_copy(data)}
    calls["ours", "sequential"] = _sequential(data)
    for codec in CODECS.names():
        label = "" if codec == BASELINE else f" {codec}"
        calls["ours" + label, "shuffled, staged"] = _epoch(data, codec, staged=True)
        calls["ours" + label, "shuffled, gathered"] = _epoch(data, codec, staged=False)
    calls["ours", "verify"] = _verify(data)
    calls["ours", "shuffled, gathered, no prefetch"] = _epoch(
        data, BASELINE, staged=False, prefetch=False
    )
    return calls


def cold_calls(data: Data) -> Calls:
    """Return calls for an empty page cache that each read all rows once, the yardstick first."""
    return {
        ("raw file", "cold reads"): _plain_reads(data),
        ("ours", "cold, sequential"): _sequential(data),
        ("ours", "cold, verify"): _verify(data),
        ("ours", "cold, shuffled, staged"): _epoch(data, BASELINE, staged=True),
    }


def write_calls(data: Data) -> Calls:
    """Return calls that each write one item and sync it to disk, the yardstick first.

    The yardstick writes a new raw file each time; ours adds an item to one store per codec.
    """
    numbers = itertools.count()
    memory = data.item.view(np.uint8).reshape(-1).data

    def raw() -> None:
        path = data.folder / f"written-{next(numbers)}.bin"
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        left = memory
        while left:
            left = left[os.write(fd, left) :]
        os.fsync(fd)
        os.close(fd)

    def ours(codec: str) -> Callable[[], object]:
        store = writer(data, data.folder / f"written-{codec}", codec)
        items = itertools.count()
        return lambda: store.write_item(next(items), data.item, data.sidecars)

    calls: Calls = {("raw file", "write + fsync"): raw}
    for codec in CODECS.names():
        system = "ours" if codec == BASELINE else f"ours {codec}"
        calls[system, "write + fsync"] = ours(codec)
    return calls


def _buffer() -> NDArray[np.uint8]:
    buffer = np.empty(BUFFER_BYTES, np.uint8)
    buffer.fill(1)  # touch its pages, so that page faults are not timed
    return buffer


def _memmap_copy(data: Data) -> Callable[[], object]:
    mapped, buffer = np.memmap(data.raw, np.uint8, "r"), _buffer()

    def call() -> None:
        for start in range(0, len(mapped), len(buffer)):
            part = mapped[start : start + len(buffer)]
            buffer[: len(part)] = part

    return call


def _plain_reads(data: Data) -> Callable[[], object]:
    buffer = _buffer()

    def call() -> None:
        fd = os.open(data.raw, os.O_RDONLY)
        size, done = os.fstat(fd).st_size, 0
        while done < size:
            place = done % len(buffer)
            done += os.preadv(fd, [buffer[place : place + _READ_BYTES].data], done)
        os.close(fd)

    return call


def _sequential(data: Data) -> Callable[[], object]:
    store = data.store()
    layout = store.header.layout(ARRAY)
    rows = np.zeros((data.shard_rows, data.d_model), BF16)
    wanted = [(chunk, chunk * layout.chunk_rows) for chunk in range(layout.n_chunks)]

    def call() -> None:
        for item in range(data.n_items):
            store.read_chunks(ARRAY, [(item, chunk, row) for chunk, row in wanted], rows)

    return call


def _verify(data: Data) -> Callable[[], object]:
    def call() -> None:
        assert verify_store(data.folder / BASELINE) == []

    return call


def _epoch(data: Data, codec: str, *, staged: bool, prefetch: bool = True) -> Callable[[], object]:
    kind = StagedStream if staged else ShuffledStream
    stream = kind(
        data.store(codec),
        [ARRAY],
        seed=0,
        batch_rows=BATCH_ROWS,
        window_items=max(data.n_items // 2, 1),
        buffer_rows=data.buffer_rows,
        prefetch=prefetch,
    )

    def call() -> None:
        for _ in range(stream.batches_per_epoch):
            stream.next()
        # Wait for the read-ahead here. Its time then counts in the pass that started it, and it
        # does not slow the next call. Each pass begins and ends with one block ready.
        stream.settle()

    return call
