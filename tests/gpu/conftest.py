"""Skip the tests of the Triton kernels without a CUDA device or Triton's interpreter."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1":
        return
    skip = pytest.mark.skip(reason="needs a CUDA device, or TRITON_INTERPRET=1")
    for item in items:
        if item.path.parent == HERE:
            item.add_marker(skip)
