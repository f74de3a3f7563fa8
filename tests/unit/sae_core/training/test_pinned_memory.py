"""Test sizes, devices and lifetime of pinned memory, with a stand-in for the CUDA runtime."""

from __future__ import annotations

import gc
import threading
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from activation_store.reading.buffers import Recycler
from foundation.errors import ConfigError
from sae_core.training.pinned_memory import pinned_on


class Runtime:
    """The parts of `torch.cuda` that the allocator calls; each thread begins on device 0."""

    def __init__(self) -> None:
        self.error = 0
        self.registered: dict[int, int] = {}
        self.devices: list[int] = []
        self.calls: list[str] = []
        self._current = threading.local()

    def current_device(self) -> int:
        return getattr(self._current, "index", 0)

    @contextmanager
    def device(self, device: torch.device) -> Any:
        before, self._current.index = self.current_device(), device.index
        yield
        self._current.index = before

    def synchronize(self, device: torch.device) -> None:
        self.calls.append(f"synchronize {device.index}")

    def cudart(self) -> Runtime:
        return self

    def cudaHostRegister(self, address: int, n_bytes: int, flags: int) -> int:
        self.devices.append(self.current_device())
        self.registered[address] = n_bytes
        return self.error

    def cudaHostUnregister(self, address: int) -> int:
        self.calls.append("unregister")
        del self.registered[address]
        return 0


@pytest.fixture
def runtime(monkeypatch):
    made = Runtime()
    for name in ("current_device", "device", "synchronize", "cudart"):
        monkeypatch.setattr(torch.cuda, name, getattr(made, name))
    return made


@pytest.mark.parametrize("n_bytes", [1, 4097, (1 << 20) + 1, 3 << 20])
def test_a_buffer_takes_no_more_than_its_size(runtime, n_bytes):
    flat = pinned_on(torch.device("cuda", 0))(n_bytes)
    assert list(runtime.registered.values()) == [n_bytes] == [flat.nbytes]
    assert flat.flags.writeable and flat.ctypes.data % 4096 == 0


def test_memory_is_unregistered_when_its_last_view_is_gone(runtime):
    recycler = Recycler(pinned_on(torch.device("cuda", 0)))
    rows = recycler.empty((8, 4), "float32")
    tensor = torch.from_numpy(rows)
    del recycler, rows
    gc.collect()
    assert runtime.registered, "a tensor still uses the memory"
    tensor.fill_(1.0)
    del tensor
    gc.collect()
    # Wait for the device first: a copy from this memory may still be running.
    assert not runtime.registered and runtime.calls == ["synchronize 0", "unregister"]


def test_a_thread_registers_memory_on_the_ranks_own_device(runtime):
    with runtime.device(torch.device("cuda", 3)):
        allocate = pinned_on(torch.device("cuda"))
    thread = threading.Thread(target=allocate, args=(64,))
    thread.start()
    thread.join()
    assert runtime.devices == [3]


def test_memory_that_cannot_be_locked_is_a_typed_error(runtime):
    runtime.error = 2
    with pytest.raises(ConfigError, match=r"store\.buffer_tokens.*error 2"):
        pinned_on(torch.device("cuda", 0))(1 << 20)
