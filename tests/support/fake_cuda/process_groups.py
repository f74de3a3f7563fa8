"""Let NCCL be torch's fake process group, in which the other ranks do not exist."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed.distributed_c10d as distributed
from torch._C._distributed_c10d import FakeProcessGroup

from tests.support.fake_cuda.mode import FakeDevice

c10d: Any = distributed


class _Options:
    """Stand-in for `ProcessGroupNCCL.Options`, which torch fills in."""

    _timeout: Any = None
    is_high_priority_stream = False
    global_ranks_in_group: list[int]
    group_name: str


def install(device: FakeDevice) -> None:
    """Replace NCCL in this process, and gloo in groups of more than one rank."""
    gloo = c10d.ProcessGroupGloo
    fake: Any = FakeProcessGroup

    def fake_group(rank: int, size: int) -> Any:
        return fake._create_internal(rank, size, fake.Options())

    class NCCL(type):
        def __call__(cls, store: Any, rank: int, size: int, options: Any) -> Any:
            return fake_group(rank, size)

        def __instancecheck__(cls, instance: Any) -> bool:
            return isinstance(instance, fake)

    class Gloo(type):
        def __call__(cls, store: Any, rank: int, size: int, timeout: Any) -> Any:
            if size == 1:
                return gloo(store, rank, size, timeout=timeout)
            return fake_group(rank, size)

        def __instancecheck__(cls, instance: Any) -> bool:
            return isinstance(instance, (fake, gloo))

    fake._set_sequence_number_for_group = lambda self: None
    c10d._NCCL_AVAILABLE = True
    c10d.default_pg_nccl_timeout = timedelta(minutes=10)
    c10d.ProcessGroupNCCL = NCCL("ProcessGroupNCCL", (), {"Options": _Options})
    c10d.ProcessGroupGloo = Gloo("ProcessGroupGloo", (), {})
    for name, own in _OBJECTS.items():
        replaced = _object_collective(device, name, own)
        setattr(c10d, name, replaced)
        setattr(torch.distributed, name, replaced)


def _object_collective(
    device: FakeDevice, name: str, own: Callable[..., None]
) -> Callable[..., None]:
    """Return a collective of Python objects that calls `own` in an NCCL group.

    Torch sends such objects through the device, which has no numbers here. On a GPU the host waits.
    """
    original = getattr(c10d, name)

    def run(*args: Any, group: Any = None, **kwargs: Any) -> None:
        if c10d.get_backend(group) != "nccl":
            original(*args, group=group, **kwargs)
            return
        device.waited(name)
        own(*args, **kwargs)

    return run


# Every rank has this rank's objects. The parameters have torch's names: callers pass them by name.
def _broadcast(object_list: list[Any], *_: Any, **__: Any) -> None:
    pass


def _all_gather(object_list: list[Any], obj: Any) -> None:
    object_list[:] = [obj] * len(object_list)


def _gather(obj: Any, object_gather_list: list[Any] | None = None, **_: Any) -> None:
    if object_gather_list is not None:
        object_gather_list[:] = [obj] * len(object_gather_list)


def _scatter(
    scatter_object_output_list: list[Any],
    scatter_object_input_list: list[Any] | None = None,
    **_: Any,
) -> None:
    if scatter_object_input_list is not None:
        scatter_object_output_list[0] = scatter_object_input_list[0]


_OBJECTS: dict[str, Callable[..., None]] = {
    "broadcast_object_list": _broadcast,
    "all_gather_object": _all_gather,
    "gather_object": _gather,
    "scatter_object_list": _scatter,
}
