"""A process that runs a share of the kernel cases of `tests/gpu` and logs their outcomes.

    python -m benchmarks.gpu.cases.worker --share 0/8 --log FILE [--stride N] [--no-pytest]

pytest runs the cases if it is installed; otherwise a small runner does.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path
from typing import Any

from benchmarks.gpu.cases.log import LOST, CaseLog, device_is_lost, share_of
from cluster.run_folder.environment import ROOT

CASES = "tests/gpu"


def main() -> int:
    """Run the share; return 0, or pytest's exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.cases.worker")
    parser.add_argument("--share", required=True, metavar="I/N")
    parser.add_argument("--log", type=Path, required=True, metavar="FILE")
    parser.add_argument("--stride", type=int, default=1)
    parser.add_argument("--no-pytest", action="store_true", help="use the small runner")
    options = parser.parse_args()
    log = CaseLog(options.log)
    if options.no_pytest or importlib.util.find_spec("pytest") is None:
        from benchmarks.gpu.cases.runner import run_cases

        return run_cases(ROOT / CASES, log, options.share, options.stride)
    import pytest

    arguments = [*case_files(), "-q", "-p", "no:cacheprovider", "-p", "no:randomly"]
    arguments += ["--continue-on-collection-errors", "--rootdir", str(ROOT)]
    return int(pytest.main(arguments, plugins=[Recorder(log, options.share, options.stride)]))


def case_files() -> list[str]:
    """Return the files of the cases. Folders in `tests/gpu` have tests that need no GPU."""
    return [str(path) for path in sorted((ROOT / CASES).glob("test_*.py"))]


class Recorder:
    """pytest plugin that selects a share of the cases and logs outcomes.

    Args:
        log: Receives the outcomes.
        share: "i/n".
        stride: Take only every n-th case.
    """

    def __init__(self, log: CaseLog, share: str, stride: int) -> None:
        self.log = log
        self.share = share
        self.stride = stride
        self.is_first = share.startswith("0/")

    def pytest_collection_modifyitems(self, config: Any, items: list[Any]) -> None:
        """Keep this process's share, without the cases that an earlier process has started."""
        mine = set(share_of([item.nodeid for item in items], self.share, self.stride))
        self.log.selected(len(mine), "pytest")
        items[:] = [item for item in items if item.nodeid in mine - self.log.seen]

    def pytest_collectreport(self, report: Any) -> None:
        """Log a module that cannot be imported, once over all processes."""
        if report.failed and self.is_first and report.nodeid not in self.log.seen:
            text = str(report.longrepr)
            missing = "ModuleNotFoundError" in text
            reason = text.strip().splitlines()[-1] if missing else text
            self.log.ended(report.nodeid, "skipped" if missing else "failed", reason)

    def pytest_runtest_logstart(self, nodeid: str, location: object) -> None:
        """Log that a case begins."""
        self.log.started(nodeid)

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Log how a case ended; end the process if the device is lost."""
        if report.when != "call" and report.passed:
            return
        text = str(report.longrepr) if report.failed else ""
        if report.skipped:
            text = report.longrepr[2] if isinstance(report.longrepr, tuple) else ""
        self.log.ended(report.nodeid, report.outcome, text)
        if device_is_lost(text):
            import pytest

            pytest.exit("the device is lost", returncode=LOST)


if __name__ == "__main__":
    sys.exit(main())
