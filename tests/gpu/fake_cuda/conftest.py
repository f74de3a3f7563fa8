"""The process with the fake CUDA device; its tests are skipped where it does not run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.fake_cuda import native
from tests.support.fake_cuda.process import FakeCudaProcess

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip all tests under Triton's interpreter, whose kernels have no compiled launches."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        skip = pytest.mark.skip(reason="interpreted kernels are not compiled")
        for item in items:
            if item.path.parent == HERE:
                item.add_marker(skip)


@pytest.fixture(scope="session")
def fake_cuda() -> Iterator[FakeCudaProcess]:
    reason = native.missing()
    if reason is not None:
        pytest.skip(f"no fake CUDA device: {reason}")
    process = FakeCudaProcess()
    yield process
    process.close()
