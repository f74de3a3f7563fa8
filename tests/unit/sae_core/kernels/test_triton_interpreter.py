"""Run the cases of the Triton kernels in Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from foundation.errors import ConfigError
from sae_core.kernels.triton.body import TritonKernels
from tests.support.paths import ROOT

CASES = sorted(str(path) for path in (ROOT / "tests" / "gpu").glob("test_triton_*.py"))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("cases", CASES, ids=lambda path: Path(path).stem)
def test_the_cases_hold_under_the_interpreter(cases):
    pytest.importorskip("triton", reason="triton is not installed: pip install triton")
    # A new process, because importing a kernel decides whether it is interpreted.
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", cases],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


def test_missing_triton_or_gpu_is_an_error_that_says_what_to_do(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ConfigError, match="kernels=stock"):
        TritonKernels()
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(
        ConfigError, match="expected triton to be installed; run pip install triton"
    ):
        TritonKernels()
