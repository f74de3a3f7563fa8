"""Record Triton launches as their compiler sees them, and compare them with the compile report."""

# mypy: disable-error-code="import-untyped, import-not-found"

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from benchmarks.kernel_configurations import OPTIONS, Configuration
from tests.support.fake_cuda.mode import FakeDevice, is_on_device, mixed
from tests.support.fake_cuda.record import Launch, place_of_call

TARGET = GPUTarget("cuda", 90, 32)
_OPTIONS = ("num_warps", "num_stages", "num_ctas", "enable_fp_fusion")
_ALLOCATION_BYTES = 512
"""CUDA's allocator returns multiples of this."""
_LARGEST_GRID = ((1 << 31) - 1, 65535, 65535)


@dataclass(frozen=True)
class _Pointer:
    """Stand-in for a tensor in a launch: what Triton's specialisation depends on."""

    dtype: torch.dtype
    offset_bytes: int

    def data_ptr(self) -> int:
        return (_ALLOCATION_BYTES << 20) + self.offset_bytes


def install(device: FakeDevice) -> None:
    """Record every Triton launch of this process in the device's record instead of running it."""

    def run(self: Any, *args: Any, grid: Any, warmup: bool = False, **kwargs: Any) -> None:
        launch = describe(self, args, kwargs, grid)
        device.record.launches[launch] += 1
        tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor)]
        # Which of the tensors a kernel writes is not known here. Each may be written.
        device.note_access(launch.kernel, [], tensors)

    JITFunction.run = run


@cache
def _binder(kernel: Any) -> tuple[Any, Any]:
    backend = make_backend(TARGET)
    return backend, create_function_from_signature(kernel.signature, kernel.params, backend)


def describe(kernel: Any, args: Iterable[Any], kwargs: Mapping[str, Any], grid: Any) -> Launch:
    """Return a launch as Triton would compile it for sm_90.

    Raises:
        MixedDevices: If an argument is a tensor of the host.
        ValueError: If the grid is larger than CUDA allows.
    """
    name = f"{kernel.module}.{kernel.fn.__name__}"
    backend, bind = _binder(kernel)
    args = [_argument(name, value) for value in args]
    kwargs = {key: _argument(name, value) for key, value in kwargs.items()}
    bound, specialization, extra = bind(*args, **kwargs)
    if callable(grid):
        grid = grid(bound)
    for size, most in zip(grid, _LARGEST_GRID, strict=False):
        if not 0 < size <= most:
            raise ValueError(f"{name}: grid {tuple(grid)}: expected sizes 1 to {_LARGEST_GRID}")
    options, signature, constants, attributes = kernel._pack_args(
        backend, dict(kwargs), bound, specialization, extra
    )
    names = list(signature)
    return Launch(
        name,
        tuple((key, str(kind)) for key, kind in signature.items() if kind != "constexpr"),
        tuple((names[path[0]], _plain(value)) for path, value in constants.items()),
        tuple(
            names[path[0]] for path, found in attributes.items() if ["tt.divisibility", 16] in found
        ),
        tuple((key, getattr(options, key)) for key in _OPTIONS),
        place_of_call()[0],
    )


def _argument(kernel: str, value: Any) -> Any:
    """Return the stand-in for an argument."""
    if not isinstance(value, torch.Tensor):
        base = getattr(value, "base", None)  # of a tensor descriptor
        if isinstance(base, torch.Tensor):
            _argument(kernel, base)
        return value
    if not is_on_device(value):
        raise mixed(kernel, value)
    return _Pointer(value.dtype, int(value.storage_offset()) * value.element_size())


def _plain(value: Any) -> Any:
    return value if isinstance(value, (bool, int, float, str, type(None))) else str(value)


def covered_by(configuration: Configuration) -> Launch:
    """Return the launch that a configuration of the compile report compiles."""
    kernel = configuration.kernel
    options = {key: value for key, value in configuration.sizes.items() if key in OPTIONS}
    parsed = make_backend(TARGET).parse_options(options)
    types = tuple(
        (name, configuration.types[name])
        for name in kernel.arg_names
        if configuration.types.get(name, "constexpr") != "constexpr"
    )
    constants = {key: value for key, value in configuration.sizes.items() if key not in OPTIONS}
    return Launch(
        f"{kernel.module}.{kernel.fn.__name__}",
        types,
        tuple((key, _plain(constants[key])) for key in kernel.arg_names if key in constants),
        tuple(
            name
            for name, kind in types
            if kind != "fp32"
            and not kind.startswith("tensordesc")
            and name not in configuration.unaligned
        ),
        tuple((key, getattr(parsed, key)) for key in _OPTIONS),
        place_of_call()[0],
    )


def why_uncovered(launch: Launch, compiled: Iterable[Launch]) -> str | None:
    """Return why no compiled configuration covers a launch, or None if one does.

    Types, constants, options and the arguments that are multiples of 16 must be equal.
    """
    same = [one for one in compiled if one.kernel == launch.kernel]
    if not same:
        return "the compile report has no such kernel"
    return min((_difference(launch, one) for one in same), key=len) or None


def _difference(launch: Launch, compiled: Launch) -> str:
    """Return what a launch has that a compiled configuration has not; empty if it is covered."""
    parts = []
    for what in ("types", "constants", "options"):
        ours, theirs = dict(getattr(launch, what)), dict(getattr(compiled, what))
        for key in sorted(ours.keys() | theirs.keys()):
            if key not in ours or key not in theirs or ours[key] != theirs[key]:
                parts.append(f"{key} is {ours.get(key)!r}, compiled {theirs.get(key)!r}")
    unaligned = [name for name in compiled.aligned if name not in launch.aligned]
    parts += [f"{name} is not a multiple of 16, compiled for multiples" for name in unaligned]
    aligned = [name for name in launch.aligned if name not in compiled.aligned]
    parts += [f"{name} is a multiple of 16, compiled for others" for name in aligned]
    return "; ".join(parts)
