"""Remove each protection from the code in turn, and check that its tests then fail.

    python -m tests.mutation --json FILE       the 22 faults of the fault table
    python -m tests.mutation --only 5,7        some of them
    python -m tests.mutation --extra           further protections

Works on a copy of the checkout; the checkout itself is never edited. The chosen tests must first
pass on the unchanged copy, because a broken test would otherwise seem to notice the mutation. Exits
with 1 if a protection can be removed without a test failing.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import psutil

from cluster.run_folder.environment import environment
from foundation.atomic_files import read_json
from tests.mutation.mutation import FAULTS, Edit, Mutation
from tests.mutation.tables import EXTRA, MUTATIONS
from tests.support.paths import ROOT

_FAILED = 1
"""pytest's exit code if tests ran and some failed; other codes mean that pytest could not run."""
_CLEAN_TIMEOUT_S = 600.0
_SPARE_S = 60.0
"""Time for imports and collection, beyond the time limits of the tests."""
_PATH = re.compile(r"(?:/[\w.\-]+)+")
_ADOPT_ORPHANS = 36
"""Linux's PR_SET_CHILD_SUBREAPER."""


@dataclass(frozen=True)
class Verdict:
    """The result of the tests without one protection."""

    outcome: str
    """"noticed": a test failed; "survived": all passed; "error": the tests could not be run."""
    how: str
    """The test that failed and the start of its message, or the end of pytest's output."""
    seconds: float


def main() -> int:
    """Run the command line; return the exit code."""
    arguments = _arguments()
    chosen = select(EXTRA if arguments.extra else MUTATIONS, arguments.only)
    _adopt_orphans()
    rows: list[tuple[Mutation, Verdict]] = []
    with tempfile.TemporaryDirectory(prefix="mutate-") as folder:
        pristine = copy_checkout(Path(folder) / "pristine")
        made = environment()
        if not arguments.skip_clean:
            clean = run_tests(copied(pristine, "clean"), unique_tests(chosen), _CLEAN_TIMEOUT_S)
            if clean.outcome != "survived":
                print(f"the tests fail on the unchanged code; fix them first: {clean.how}")
                return 1
            print(f"{len(unique_tests(chosen))} tests pass on the unchanged code", flush=True)
        print(f"{'fault':>5} {'s':>5}  {'outcome':<9} without the protection")
        for mutation in chosen:
            verdict = judge(mutation, pristine)
            rows.append((mutation, verdict))
            print(_line(mutation, verdict), flush=True)
            if arguments.json:
                _write(arguments, rows, made)
    noticed = [mutation for mutation, verdict in rows if verdict.outcome == "noticed"]
    whole = [
        fault for fault in _faults(chosen) if _faults(chosen, fault) == _faults(noticed, fault)
    ]
    print(f"{len(noticed)} of {len(rows)} mutations noticed", end="")
    print(f"; {len(whole)} of {len(_faults(chosen))} faults" if not arguments.extra else "")
    return int(len(noticed) < len(rows))


def select(mutations: Sequence[Mutation], only: str | None) -> list[Mutation]:
    """Return the mutations of the faults in a list such as "5,7", or all if `only` is empty."""
    faults = {int(number) for number in only.split(",")} if only else None
    return [m for m in mutations if faults is None or m.fault in faults]


def unique_tests(mutations: Sequence[Mutation]) -> list[str]:
    """Return the tests of all mutations in order, without duplicates."""
    return list(dict.fromkeys(test for mutation in mutations for test in mutation.tests))


def judge(mutation: Mutation, pristine: Path) -> Verdict:
    """Remove a protection from a fresh copy and run its tests there."""
    tree = copied(pristine, "mutant")
    try:
        for edit in mutation.edits:
            path = tree / edit.file
            path.write_text(mutated(path.read_text(), edit))
        return run_tests(tree, mutation.tests, mutation.timeout_s)
    finally:
        shutil.rmtree(tree, ignore_errors=True)


def mutated(text: str, edit: Edit) -> str:
    """Return a file's text after an edit.

    Raises:
        ValueError: If the text to replace does not occur exactly once.
    """
    if text.count(edit.old) != 1:
        raise ValueError(
            f"{edit.file}: {text.count(edit.old)} times {edit.old!r}, expected once; "
            "update the table in tests/mutation"
        )
    return text.replace(edit.old, edit.new)


def copy_checkout(folder: Path) -> Path:
    """Copy the checkout's tracked files, and new files that git does not ignore."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


def copied(pristine: Path, name: str) -> Path:
    """Copy the pristine copy for one run of tests; later edits of the checkout do not affect it."""
    return Path(shutil.copytree(pristine, pristine.with_name(name)))


def run_tests(tree: Path, tests: Sequence[str], timeout_s: float) -> Verdict:
    """Run tests in a copy until the first failure.

    Args:
        tree: The copy.
        tests: pytest's ids.
        timeout_s: Time limit of each test; a test that takes longer counts as failed.

    Returns:
        The verdict; "survived" if all tests pass.
    """
    report = tree / "report.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    command += ["--timeout", str(timeout_s), f"--junitxml={report}", *tests]
    variables = os.environ | {"PYTHONPATH": str(tree), "OMP_WAIT_POLICY": "passive"}
    began = time.monotonic()
    with open(tree / "output.txt", "w+") as output, _kill_leftovers():
        process = subprocess.Popen(
            command, cwd=tree, env=variables, stdout=output, stderr=output, start_new_session=True
        )
        try:
            code = process.wait(len(tests) * timeout_s + _SPARE_S)
        except subprocess.TimeoutExpired:
            return Verdict("noticed", "timed out", time.monotonic() - began)
        output.seek(0)
        said = output.read()
    outcome, how = _outcome(code, report, said)
    return Verdict(outcome, how, time.monotonic() - began)


def _outcome(code: int, report: Path, said: str) -> tuple[str, str]:
    """Return (outcome, how): only a test that ran and failed counts as noticing a mutation."""
    if code not in (0, _FAILED) or not report.exists():
        return "error", f"pytest ended with {code}: {said[-2000:]}"
    cases = list(ElementTree.parse(report).iter("testcase"))
    failures = [(case, failure) for case in cases for failure in case.iter("failure")]
    if code == _FAILED and failures:
        case, failure = failures[0]
        message = " ".join((failure.get("message") or "").split())
        return "noticed", f"{case.get('name')}: {_PATH.sub('PATH', message)[:120]}"
    skipped = [case for case in cases if case.find("skipped") is not None]
    if code == 0 and cases and not skipped:
        return "survived", ""
    return "error", f"{len(skipped)} tests skipped, or an error in their setup: {said[-2000:]}"


@contextmanager
def _kill_leftovers() -> Iterator[None]:
    """Kill all processes that the block started; mutants leave some frozen or orphaned."""
    before = {process.pid for process in psutil.Process().children()}
    try:
        yield
    finally:
        # Killing a process makes its children ours, so several passes may be needed.
        for _ in range(5):
            new = [p for p in psutil.Process().children(recursive=True) if p.pid not in before]
            if not new:
                break
            for process in new:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(new, timeout=5)


def _adopt_orphans() -> None:
    """Become the parent of orphaned descendants, and clean up on SIGTERM."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_ADOPT_ORPHANS, 1, 0, 0, 0)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))


def _faults(mutations: Sequence[Mutation], fault: int | None = None) -> list[int]:
    """Return the distinct faults in order or, if `fault` is given, each of its occurrences."""
    if fault is not None:
        return [m.fault for m in mutations if m.fault == fault]
    return sorted({mutation.fault for mutation in mutations})


def _line(mutation: Mutation, verdict: Verdict) -> str:
    lines = [f"{mutation.fault:>5} {verdict.seconds:>5.0f}  {verdict.outcome:<9} {mutation.what}"]
    if verdict.outcome != "noticed":
        lines.append(verdict.how)
    return "\n".join(lines)


def _write(
    arguments: argparse.Namespace, rows: list[tuple[Mutation, Verdict]], made: dict[str, Any]
) -> None:
    """Write the table as JSON; with `--only`, keep the file's rows of other faults."""
    path: Path = arguments.json
    table: list[dict[str, Any]] = [
        {"fault": mutation.fault, "fault_text": FAULTS.get(mutation.fault, "")}
        | asdict(mutation)
        | asdict(verdict)
        | {"passed_unmutated": not arguments.skip_clean, "commit": made["commit"]}
        for mutation, verdict in rows
    ]
    if arguments.only and path.exists():
        chosen = {int(number) for number in arguments.only.split(",")}
        table += [row for row in read_json(path)["rows"] if row["fault"] not in chosen]
        table.sort(key=lambda row: row["fault"])
    faults = {row["fault"] for row in table}
    unnoticed = {row["fault"] for row in table if row["outcome"] != "noticed"}
    counts = {
        "faults": len(faults),
        "faults_noticed": len(faults - unnoticed),
        "mutations": len(table),
        "mutations_noticed": sum(row["outcome"] == "noticed" for row in table),
    }
    command = shlex.join(["python", "-m", "tests.mutation", *sys.argv[1:]])
    value = made | {"command": command} | counts | {"rows": table}
    path.write_text(json.dumps(value, indent=1) + "\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument(
        "--only", help="numbers of faults, such as 5,7; other rows of the --json file are kept"
    )
    parser.add_argument(
        "--extra", action="store_true", help="test further protections instead of the 22 faults"
    )
    parser.add_argument(
        "--skip-clean", action="store_true", help="do not run the tests on the unchanged code first"
    )
    return parser.parse_args()
