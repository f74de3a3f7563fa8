"""The process with the fake CUDA device; its tests are skipped where it does not run."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.fake_cuda import native
from tests.support.fake_cuda.process import FakeCudaProcess


@pytest.fixture(scope="session")
def fake_cuda() -> Iterator[FakeCudaProcess]:
    reason = native.missing()
    if reason is not None:
        pytest.skip(f"no fake CUDA device: {reason}")
    process = FakeCudaProcess()
    yield process
    process.close()
