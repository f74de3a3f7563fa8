"""Records of the fake CUDA device while a program runs on it. Does not import torch."""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

from tests.support.paths import ROOT

_PROJECT = ("activation_store/", "analysis/", "cluster/", "foundation/", "sae_core/")
_MACHINERY = tuple(
    f"tests/support/fake_cuda/{name}.py"
    for name in (
        "launches",
        "mode",
        "operators",
        "process_groups",
        "record",
        "streams",
        "torch_cuda",
    )
)


@dataclass(frozen=True)
class Place:
    """A line of the project that called torch, Triton or DeepSpeed."""

    file: str
    """Path relative to the repository."""
    line: int
    function: str
    """Qualified name, like `SAEEngine.train_step`."""

    def __str__(self) -> str:
        return f"{self.file}:{self.line} in {self.function}"

    @property
    def key(self) -> str:
        """File and function, which stay the same when other lines of the file change."""
        return f"{self.file}: {self.function}"


@dataclass(frozen=True)
class Wait:
    """The host waits for the device, or for a copy between them."""

    what: str
    """Operation that waits, like `item` or `nonzero`."""
    at: Place
    via: str
    """Function outside the project that the wait happens in; empty if the project calls torch."""

    def __str__(self) -> str:
        return f"{self.at}: {self.what}{self.via and ' via ' + self.via}"

    @property
    def key(self) -> str:
        """Place without its line, and the operation."""
        return f"{self.at.key}: {self.what}"


@dataclass(frozen=True)
class Launch:
    """One Triton launch, as the compiler sees it."""

    kernel: str
    """`module.function`."""
    types: tuple[tuple[str, str], ...]
    """Triton type of each run-time argument, in the order of the parameters. A number that is 1 is
    a constant."""
    constants: tuple[tuple[str, Any], ...]
    """Compile-time arguments, in the order of the parameters."""
    aligned: tuple[str, ...]
    """Run-time arguments that are multiples of 16."""
    options: tuple[tuple[str, Any], ...]
    """Compiler options."""
    at: Place

    def __str__(self) -> str:
        types = ", ".join(
            f"{name}: {kind}{'/16' if name in self.aligned else ''}" for name, kind in self.types
        )
        constants = ", ".join(f"{name}={value}" for name, value in self.constants)
        return f"{self.kernel}({types}; {constants}) from {self.at}"


@dataclass
class Record:
    """Everything recorded since the last `clear`."""

    waits: Counter[Wait] = field(default_factory=Counter)
    launches: Counter[Launch] = field(default_factory=Counter)
    operators: Counter[str] = field(default_factory=Counter)
    """torch operators that ran on the device, like `aten.index_add_.default`."""
    atomics: Counter[Wait] = field(default_factory=Counter)
    """Operators that add floats in no fixed order on CUDA."""
    collectives: Counter[str] = field(default_factory=Counter)
    """Collectives on the device."""
    races: Counter[str] = field(default_factory=Counter)
    """Accesses that another stream's work may overlap, because no event orders them."""

    @property
    def wait_keys(self) -> set[str]:
        """Waits without their lines; see `Wait.key`."""
        return {wait.key for wait in self.waits}


def frames() -> Iterator[FrameType]:
    """Yield the frames of the calling thread, innermost first, without those of the fake device."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if not frame.f_code.co_filename.endswith(_MACHINERY):
            yield frame
        frame = frame.f_back


def place_of_call() -> tuple[Place, str]:
    """Return the innermost line of the project, and the outermost function that it called.

    Code outside the project, like a test, counts as the project if no frame belongs to it.
    """
    root = f"{ROOT}/"
    outside = ""
    innermost: FrameType | None = None
    for frame in frames():
        name = frame.f_code.co_filename
        if innermost is None and not name.startswith("<") and "site-packages" not in name:
            innermost = frame
        if name.startswith(root) and name.removeprefix(root).startswith(_PROJECT):
            return _place(frame), outside
        if "site-packages/" in name and "/torch/" not in name:
            outside = f"{name.rpartition('site-packages/')[2]} {frame.f_code.co_qualname}"
    assert innermost is not None
    return _place(innermost), ""


def _place(frame: FrameType) -> Place:
    code = frame.f_code
    # Some versions of Python run a comprehension in a separate function.
    function = re.sub(r"(\.<locals>\.<\w+>)+$", "", code.co_qualname)
    return Place(code.co_filename.removeprefix(f"{ROOT}/"), frame.f_lineno, function)
