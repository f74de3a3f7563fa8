"""Run the kernel cases without pytest: a stand-in for the parts of pytest that they use.

Supported: `mark.parametrize`, `param`, `mark.skip`, `mark.skipif`, other marks (ignored), `raises`
with `match`, the fixture `monkeypatch` with `setattr`, and fixtures of a module that run for every
case and take only `monkeypatch`. Cases that take other fixtures of their module are skipped; a case
that needs anything else fails and says so.
"""

from __future__ import annotations

import importlib
import inspect
import itertools
import pkgutil
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

from benchmarks.gpu.cases.log import LOST, CaseLog, device_is_lost, share_of


@dataclass(frozen=True)
class Case:
    """One test function with one set of parameters."""

    name: str
    function: Callable[..., object]
    arguments: dict[str, object]
    skip: str = ""
    """Why it is skipped; empty if it runs."""


@dataclass(frozen=True)
class Mark:
    """A mark, which also decorates functions."""

    name: str
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Decorate a function, or return the mark with arguments."""
        if len(args) == 1 and not kwargs and inspect.isfunction(args[0]):
            function: Any = args[0]
            function.pytestmark = [*getattr(function, "pytestmark", []), self]
            return function
        return Mark(self.name, args, kwargs)


class Marks:
    """`pytest.mark`: any attribute is a mark."""

    def __getattr__(self, name: str) -> Mark:
        return Mark(name)


class Raises:
    """`pytest.raises`: check that a block raises an exception whose text matches a pattern.

    Args:
        expected: Type of the exception.
        match: Pattern to find in its text; None accepts any text.
    """

    def __init__(self, expected: type[BaseException], match: str | None = None) -> None:
        self._expected = expected
        self._match = match

    def __enter__(self) -> Raises:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        frames: TracebackType | None,
    ) -> bool:
        if error is None:
            raise AssertionError(f"expected {self._expected.__name__}, nothing was raised")
        if not isinstance(error, self._expected):
            return False
        if self._match is not None and not re.search(self._match, str(error)):
            raise AssertionError(f"{str(error)!r} does not match {self._match!r}") from error
        return True


class MonkeyPatch:
    """The fixture `monkeypatch`, as far as `setattr` goes."""

    def __init__(self) -> None:
        self._changes: list[tuple[object, str, object]] = []

    def setattr(self, target: Any, name: Any, value: Any = None) -> None:
        """Set `target.name = value`, or `setattr("module.name", value)`, until `undo`."""
        if isinstance(target, str):
            module, _, attribute = target.rpartition(".")
            target, name, value = pkgutil.resolve_name(module), attribute, name
        self._changes.append((target, name, getattr(target, name)))
        setattr(target, name, value)

    def undo(self) -> None:
        """Restore everything, latest change first."""
        while self._changes:
            target, name, value = self._changes.pop()
            setattr(target, name, value)


Function = Callable[..., Any]
_FIXTURES: dict[Function, str] = {}
"""Declared fixtures: "autouse", or "by name"."""


@dataclass(frozen=True)
class Param:
    """`pytest.param`: one row of parameters."""

    values: tuple[Any, ...]


def _param(*values: Any, id: str | None = None) -> Param:
    """Return a row of parameters; its name is not used."""
    return Param(values)


def _fixture(autouse: bool = False, scope: str = "function") -> Callable[[Function], Function]:
    """Return a decorator that declares a fixture of the module."""

    def declare(function: Function) -> Function:
        _FIXTURES[function] = "autouse" if autouse else "by name"
        return function

    return declare


def _fixtures_of(function: Function, kind: str) -> dict[str, Function]:
    """Return the fixtures of this kind in a function's module, by name."""
    module = vars(sys.modules[function.__module__])
    return {
        name: each
        for name, each in module.items()
        if inspect.isfunction(each) and _FIXTURES.get(each) == kind
    }


def stand_in() -> ModuleType:
    """Return a module with the parts of pytest that the cases use."""
    module: Any = ModuleType("pytest")
    module.mark = Marks()
    module.raises = Raises
    module.param = _param
    module.fixture = _fixture
    module.MonkeyPatch = MonkeyPatch
    return module


def run_cases(folder: Path, log: CaseLog, share: str, stride: int) -> int:
    """Run a share of the cases in a folder.

    Args:
        folder: Folder of the test modules, below the checkout.
        log: Receives the outcomes.
        share: "i/n".
        stride: Take only every n-th case.

    Returns:
        0, or `LOST` after an error that makes the device unusable for this process.
    """
    sys.modules["pytest"] = stand_in()
    root = folder.parents[1]
    sys.path.insert(0, str(root))
    found: list[Case] = []
    for path in sorted(folder.glob("test_*.py")):
        name = path.relative_to(root).as_posix()
        try:
            module = importlib.import_module(".".join(Path(name).with_suffix("").parts))
            found += cases_of(module, name)
        except Exception as error:  # a module that cannot be imported is one more outcome
            if share.startswith("0/") and name not in log.seen:
                missing = isinstance(error, ModuleNotFoundError)
                text = f"{type(error).__name__}: {error}" if missing else traceback.format_exc()
                log.ended(name, "skipped" if missing else "failed", text)
    mine = set(share_of([case.name for case in found], share, stride))
    log.selected(len(mine), "without pytest")
    for case in found:
        if case.name in mine - log.seen and not _run(case, log):
            return LOST
    return 0


def _run(case: Case, log: CaseLog) -> bool:
    """Run one case; return False if the device is lost."""
    log.started(case.name)
    if case.skip:
        log.ended(case.name, "skipped", case.skip)
        return True
    patch = MonkeyPatch()
    wanted = inspect.signature(case.function).parameters
    own = sorted(set(wanted) & _fixtures_of(case.function, "by name").keys())
    if own:
        log.ended(case.name, "skipped", f"needs pytest for its fixtures: {', '.join(own)}")
        return True
    fixtures = {"monkeypatch": patch} if "monkeypatch" in wanted else {}
    text = ""
    try:
        missing = sorted(set(wanted) - set(case.arguments) - set(fixtures))
        if missing:
            raise TypeError(f"fixtures {missing} are not supported without pytest")
        for each in _fixtures_of(case.function, "autouse").values():
            each(patch)
        case.function(**case.arguments, **fixtures)
    except Exception:  # the case failed, whatever it raised
        text = traceback.format_exc()
    finally:
        patch.undo()
    log.ended(case.name, "failed" if text else "passed", text)
    return not device_is_lost(text)


def cases_of(module: ModuleType, name: str) -> Iterator[Case]:
    """Yield the cases of a module, in the order of the file.

    Args:
        module: The imported module.
        name: Its file, as in the names of cases.
    """
    own = getattr(module, "pytestmark", [])
    shared = own if isinstance(own, list) else [own]
    for attribute, function in vars(module).items():
        if not attribute.startswith("test_") or not inspect.isfunction(function):
            continue
        if function.__module__ != module.__name__:
            continue
        marks = [*shared, *getattr(function, "pytestmark", [])]
        skip = next((reason for reason in map(_skip_reason, marks) if reason), "")
        for number, arguments in enumerate(_parameters(marks)):
            label = f"[{number}]" if arguments else ""
            yield Case(f"{name}::{attribute}{label}", function, arguments, skip)


def _skip_reason(mark: Mark) -> str:
    is_met = mark.name == "skip" or (mark.name == "skipif" and bool(mark.args[0]))
    return str(mark.kwargs.get("reason", "skipped")) if is_met else ""


def _row_of(value: Any, n_names: int) -> tuple[Any, ...]:
    """Return the parameters of one case; a single parameter may stand by itself."""
    if isinstance(value, Param):
        return value.values
    return tuple(value) if n_names > 1 else (value,)


def _parameters(marks: list[Mark]) -> Iterator[dict[str, object]]:
    """Yield every combination of the parameters of all `parametrize` marks."""
    choices = []
    for mark in marks:
        if mark.name != "parametrize":
            continue
        names, values = mark.args[:2]
        if isinstance(names, str):
            names = [one.strip() for one in names.split(",")]
        rows = [_row_of(value, len(names)) for value in values]
        choices.append([dict(zip(names, row, strict=True)) for row in rows])
    for combination in itertools.product(*choices):
        merged: dict[str, object] = {}
        for part in combination:
            merged |= part
        yield merged
