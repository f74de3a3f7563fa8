"""Replace what `torch.cuda` asks a CUDA driver for."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from torch._subclasses import fake_tensor

from tests.support.fake_cuda import process_groups, streams
from tests.support.fake_cuda.mode import Captured, FakeDevice
from tests.support.fake_cuda.streams import StreamOrder

NAME = "NVIDIA H100 80GB HBM3"
CAPABILITY = (9, 0)
MEMORY_BYTES = 80 << 30
_WITHOUT_EFFECT = ("_lazy_init", "init", "empty_cache", "reset_peak_memory_stats", "set_device")
_MEMORY = (
    "memory_allocated",
    "max_memory_allocated",
    "memory_reserved",
    "max_memory_reserved",
    "reset_max_memory_allocated",
    "reset_max_memory_cached",
)


def install(library: ctypes.CDLL) -> FakeDevice:
    """Make this process see one CUDA device, and return the mode that must be active to use it.

    This cannot be undone: the process cannot be used for anything else afterwards.
    """
    order = StreamOrder(library)
    device = FakeDevice(order)
    # `torch.tensor(data, device="cuda")` then makes a tensor of the host and copies it, visibly.
    torch._C._set_only_lift_cpu_tensors(True)
    replaced: dict[str, Any] = dict.fromkeys(_WITHOUT_EFFECT, lambda *_, **__: None)
    replaced |= dict.fromkeys(_MEMORY, lambda *_, **__: 0)
    replaced |= {**_properties(), **_streams(device, order), **_graphs(device, order)}
    _set(torch.cuda, {**replaced, "cudart": lambda: CudaRuntime(library)})
    _set(torch.cuda.nccl, {"version": lambda: (2, 28, 0)})
    _set(torch.cuda.nvtx, dict.fromkeys(("range_push", "range_pop", "mark"), lambda *_: 0))
    _set(torch.accelerator, {"synchronize": torch.cuda.synchronize})
    _set(torch.nn.Module, {"_apply": _apply})
    _set(fake_tensor, {"init_gpu_context": lambda device: None})
    # In inference mode torch does not split operations into those that `FakeDevice` knows.
    _set(torch, {"inference_mode": lambda mode=True: torch.no_grad()})
    process_groups.install(device)
    # Initialises torch's side of the device; until then, no memory counts as pinned.
    torch.empty(1, pin_memory=True)
    return device


class CudaRuntime:
    """Stand-in for the module that `torch.cuda.cudart` returns."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library

    def cudaHostRegister(self, address: int, n_bytes: int, flags: int) -> int:
        """Page-lock memory, and return CUDA's error code."""
        return int(self._library.fake_cuda_host_register(address, n_bytes))

    def cudaHostUnregister(self, address: int) -> int:
        """Undo `cudaHostRegister`, and return CUDA's error code."""
        return int(self._library.fake_cuda_host_unregister(address))


def _set(module: Any, values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        setattr(module, name, value)


def _properties() -> dict[str, Any]:
    """Return stand-ins for the functions that describe the device."""
    properties = SimpleNamespace(
        name=NAME,
        major=CAPABILITY[0],
        minor=CAPABILITY[1],
        total_memory=MEMORY_BYTES,
        multi_processor_count=132,
        warp_size=32,
        L2_cache_size=50 << 20,
        shared_memory_per_multiprocessor=228 << 10,
        shared_memory_per_block_optin=227 << 10,
    )
    return {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "is_bf16_supported": lambda *_, **__: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "device": lambda _: nullcontext(),
        "get_device_capability": lambda *_: CAPABILITY,
        "get_device_name": lambda *_: NAME,
        "get_device_properties": lambda *_: properties,
        "mem_get_info": lambda *_: (MEMORY_BYTES, MEMORY_BYTES),
    }


def _streams(device: FakeDevice, order: StreamOrder) -> dict[str, Any]:
    """Return stand-ins for streams, events and synchronisation."""
    stream_class, event_class = streams.make_classes(order, device.waited)

    def synchronize(_: Any = None) -> None:
        device.waited("torch.cuda.synchronize")
        order.wait_on_host(order.everything())

    def stream_of(number: int) -> Any:
        return stream_class(stream_id=number, device_index=0, device_type=1)

    return {
        "synchronize": synchronize,
        "Stream": stream_class,
        "Event": event_class,
        "stream": lambda stream: streams.current(order, stream),
        "current_stream": lambda *_: stream_of(order.current),
        "default_stream": lambda *_: stream_of(0),
        "set_stream": lambda stream: order.exchange(stream.stream_id),
    }


def _graphs(device: FakeDevice, order: StreamOrder) -> dict[str, Any]:
    """Return stand-ins for CUDA graphs. A wait raises an error while one is captured."""

    class CUDAGraph:
        def __init__(self) -> None:
            self._captured = Captured()

        def capture_begin(self, *_: Any, **__: Any) -> None:
            device.captured = self._captured = Captured()

        def capture_end(self) -> None:
            device.captured = None

        def replay(self) -> None:
            device.replay(self._captured)

        def reset(self) -> None: ...

        def pool(self) -> tuple[int, int]:
            return (0, 1)

    @contextmanager
    def graph(
        captured: CUDAGraph, pool: Any = None, stream: Any = None, **_: Any
    ) -> Iterator[None]:
        torch.cuda.synchronize()
        with streams.current(order, stream or torch.cuda.Stream()):
            captured.capture_begin()
            try:
                yield
            finally:
                captured.capture_end()

    return {
        "CUDAGraph": CUDAGraph,
        "graph": graph,
        "graph_pool_handle": lambda: (0, 1),
        "is_current_stream_capturing": lambda: device.captured is not None,
    }


def _apply(self: torch.nn.Module, fn: Callable[[torch.Tensor], torch.Tensor]) -> torch.nn.Module:
    """Convert a module's tensors; a replacement for `Module._apply`.

    Torch changes a parameter in place, which is impossible between a real and a fake tensor. Here
    a parameter that moves is replaced, with its attributes.
    """
    for module in self.modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            with torch.no_grad():
                applied = fn(parameter)
            if applied is not parameter:
                moved = torch.nn.Parameter(applied, parameter.requires_grad)
                moved.__dict__.update(parameter.__dict__)
                module._parameters[name] = moved
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = fn(buffer)
    return self
