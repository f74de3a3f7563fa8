"""Test the command line where another package has the name of one of ours."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from foundation.errors import EXIT_BAD_INPUT
from tests.support.paths import ROOT

COMMAND = "import sys; sys.argv[1:] = ['--keys', 'fit']; import launch; launch.main()"


@pytest.mark.parametrize("name", ["conf", "analysis", "cluster"])
def test_a_package_of_the_same_name_is_told(name: str, tmp_path: Path) -> None:
    def run() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", COMMAND],
            cwd=tmp_path,
            env={"PYTHONPATH": f"{tmp_path}:{ROOT}", "PATH": ""},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    assert run().returncode == 0
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").touch()
    done = run()
    assert done.returncode == EXIT_BAD_INPUT, done.stderr
    assert done.stderr.count("\n") == 1
    assert f"package {name!r} was found in {tmp_path / name}: expected {ROOT / name}" in done.stderr
