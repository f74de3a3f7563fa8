"""The dispatch mode behind the fake device: host tensors are real, CUDA tensors have no numbers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FakeWork
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.support.fake_cuda import operators
from tests.support.fake_cuda.record import Record, Wait, place_of_call
from tests.support.fake_cuda.streams import StreamOrder

_aten = torch.ops.aten
CUDA = torch.device("cuda", 0)
_RETURN_WORK_ONLY = {"alltoall_base_", "reduce_", "allreduce_coalesced_", "barrier"}


class MixedDevices(RuntimeError):
    """A tensor of the host in an operation on the device."""


class CaptureError(RuntimeError):
    """The host waits for the device while it captures a CUDA graph."""


class Captured:
    """The operations of a CUDA graph: the storages of the tensors that they read and write."""

    def __init__(self) -> None:
        self.read: dict[int, torch.Tensor] = {}
        self.written: dict[int, torch.Tensor] = {}

    def add(self, read: Iterable[torch.Tensor], written: Iterable[torch.Tensor]) -> None:
        """Add an operation."""
        self.read |= {tensor.untyped_storage()._cdata: tensor for tensor in read}
        self.written |= {tensor.untyped_storage()._cdata: tensor for tensor in written}


class FakeDevice(TorchDispatchMode):
    """Replaces a CUDA device while it is active.

    Tensors of the host are real, and operations on them run. A tensor on `cuda` has a dtype, shape
    and strides but no numbers: its operations run in torch's `FakeTensorMode`.

    Args:
        order: Order of the streams' operations.
    """

    def __init__(self, order: StreamOrder) -> None:
        super().__init__()
        self.record = Record()
        self.order = order
        self.captured: Captured | None = None
        """The CUDA graph that is being captured, if any."""
        self.answers: Mapping[str, int] = {}
        """What the device answers where the host asks for a number, by `Place.key`. It is the value
        of an `item` or of all elements of a copy to the host, or the length of a result of unknown
        length, but never more than its largest length. Without an answer, an `item` is 1, a copy 0
        and a length the largest."""
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)

    def clear(self) -> Record:
        """Start a new record, and return the last one."""
        record, self.record = self.record, Record()
        return record

    def waited(self, what: str) -> None:
        """Record that the host waits for the device.

        Raises:
            CaptureError: If a CUDA graph is being captured, like on a GPU.
        """
        place, via = place_of_call()
        self.record.waits[Wait(what, place, via)] += 1
        if self.captured is not None:
            raise CaptureError(f"{place}: {what} while a CUDA graph is captured")

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run one operation on the device or on the host."""
        kwargs = dict(kwargs or {})
        tensors = _tensors((args, kwargs))
        if func.namespace == "c10d":
            return self._collective(func, args, kwargs, tensors)
        wanted = kwargs.get("device")
        made_there = wanted is not None and torch.device(wanted).type == "cuda"
        if not made_there and not any(map(is_on_device, tensors)):
            return func(*args, **kwargs)
        if func.namespace == "prim":  # asks for a property, like the device
            return self._run(func, args, kwargs)
        self.record.operators[str(func)] += 1
        if func in operators.COPIES:
            return self._copy(func, args, kwargs)
        if func in (_aten.record_stream.default, _aten.is_pinned.default):
            return False if func is _aten.is_pinned.default else None
        return self._compute(func, args, kwargs, tensors)

    def _compute(
        self,
        func: OpOverload,
        args: Sequence[Any],
        kwargs: dict[str, Any],
        tensors: Sequence[torch.Tensor],
    ) -> Any:
        """Run an operation of the device, which may make the host wait."""
        self._check_devices(func, tensors)
        what = operators.waits_for(func, args, kwargs)
        if operators.has_unknown_result(func, args, kwargs):
            with self._fake:
                out = operators.result(func, args, kwargs, self._answer)
        else:
            out = self._run(func, args, kwargs)
        self._note_order(func, args, tensors, out)
        if what is not None:
            self._waited_for_stream(what)
        if func in operators.UNORDERED and any(t.dtype.is_floating_point for t in tensors):
            place, via = place_of_call()
            self.record.atomics[Wait(str(func), place, via)] += 1
        return out

    def _answer(self, otherwise: int) -> int:
        return self.answers.get(place_of_call()[0].key, otherwise)

    def _run(self, func: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        if func is _aten._fused_adam_.tensor_lr:
            # Has no fake implementation; the overload for a number does the same to shapes.
            func = _aten._fused_adam_.default
            kwargs = {**kwargs, "lr": 0.0}
        with self._fake:
            return func(*args, **kwargs)

    def _waited_for_stream(self, what: str) -> None:
        """Record that the host waits for the current stream."""
        self.waited(what)
        self.order.wait_on_host(self.order.clock(self.order.current))

    def _copy(self, func: OpOverload, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Run a copy on the device, or between it and the host."""
        target: Any = None
        source = args[0]
        if func is not _aten._to_copy.default:
            target, source = args[:2] if func is _aten.copy_.default else reversed(args[:2])
        wanted = kwargs.get("device") or source.device if target is None else target.device
        device = torch.device(wanted)
        to_host = device.type == "cpu"
        if is_on_device(source) and not to_host:
            out = self._run(func, args, kwargs)
            self._note_order(func, args, _tensors(args), out)
            return out
        non_blocking = kwargs.get("non_blocking") or (target is not None and args[2:3] == (True,))
        # `.to("cpu", non_blocking=True)` allocates pinned memory for its result.
        host = target if to_host else source
        fast = host is None or (host.is_pinned() and host.is_contiguous())
        dtype = kwargs.get("dtype") or source.dtype
        out = target  # the numbers of a target on the host stay as they are
        if out is None and to_host:
            out = torch.full(source.shape, self._answer(0), dtype=dtype)
        elif out is None:
            strides = torch.empty_like(source, device="meta").stride()
            with self._fake:
                out = torch.empty_strided(source.shape, strides, dtype=dtype, device=device)
        self._note_order(func, (), [source] if to_host else [], out)
        if not (non_blocking and fast):
            self._waited_for_stream("copy to host" if to_host else "copy to device")
        return out

    def _check_devices(self, func: OpOverload, tensors: Sequence[torch.Tensor]) -> None:
        """Raise MixedDevices for a tensor of the host, or record the wait if it is an index."""
        for tensor in tensors:
            if is_on_device(tensor) or tensor.dim() == 0:  # a scalar is passed by value
                continue
            indexes = func in operators.INDEXINGS and tensor.dtype in operators.INDEX_DTYPES
            if not indexes or not is_on_device(tensors[0]):
                raise mixed(str(func), tensor)
            self._waited_for_stream("copy of an index to device")

    def _collective(
        self,
        func: OpOverload,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        tensors: Sequence[torch.Tensor],
    ) -> Any:
        """Run a collective on the host, or record one on the device."""
        name = func.name().removeprefix("c10d::")
        groups = (
            dist.ProcessGroup.unbox(leaf)
            for leaf in tree_leaves((args, kwargs))
            if isinstance(leaf, torch.ScriptObject) and "ProcessGroup" in str(leaf._type())
        )
        backend = dist.get_backend(next(groups))
        if name == "barrier" and backend == "nccl":
            self.waited(name)
        if not any(map(is_on_device, tensors)):
            return func(*args, **kwargs)
        for tensor in tensors:
            if not is_on_device(tensor):
                raise mixed(name, tensor)
        if backend != "nccl":
            self._waited_for_stream(f"{name} of {backend}")  # through memory of the host
        self.record.collectives[name] += 1
        self._note_order(func, args, tensors, tensors)
        work = FakeWork().boxed()
        return work if name in _RETURN_WORK_ONLY else (args[0], work)

    def _note_order(
        self, func: OpOverload, args: Sequence[Any], read: Iterable[torch.Tensor], out: Any
    ) -> None:
        """Add an operation to its stream, and record races with other streams."""
        schema = func._schema
        if not schema.is_mutable and any(one.alias_info is not None for one in schema.returns):
            return  # a view reads and writes nothing
        written = _tensors(out)
        for value, argument in zip(args, schema.arguments, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                written += _tensors(value)
        self.note_access(
            str(func),
            [tensor for tensor in read if is_on_device(tensor)],
            [tensor for tensor in written if is_on_device(tensor)],
        )

    def note_access(self, what: str, read: list[torch.Tensor], written: list[torch.Tensor]) -> None:
        """Add an operation to the graph that is captured, or else to the current stream."""
        if self.captured is not None:
            self.captured.add(read, written)
            return
        for race in self.order.run(read, written):
            self.record.races[f"{place_of_call()[0]}: {what}: {race}"] += 1

    def replay(self, captured: Captured) -> None:
        """Run a CUDA graph on the current stream."""
        self.record.operators["cuda_graph.replay"] += 1
        self.note_access("graph", [*captured.read.values()], [*captured.written.values()])


def is_on_device(tensor: torch.Tensor) -> bool:
    """Return True for a tensor of the fake device."""
    return isinstance(tensor, FakeTensor) and tensor.fake_device.type == "cuda"


def mixed(what: str, tensor: torch.Tensor) -> MixedDevices:
    """Return the error for a tensor of the host in an operation of the device."""
    return MixedDevices(
        f"{what}: a tensor of shape {tuple(tensor.shape)} is on {tensor.device}, expected cuda; "
        f"at {place_of_call()[0]}"
    )


def _tensors(values: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]
