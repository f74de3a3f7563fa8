"""Test that a device gathers the same rows as the host."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from activation_store import Calibration, ShuffledStream, StagedStream, StoreWriter, open_store
from cluster.training.device_gather import DeviceRows, to_torch

ORDER: dict[str, Any] = {"seed": 3, "batch_rows": 96, "window_items": 2, "buffer_rows": 300}


@pytest.mark.parametrize("codec", ["none", "int8"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_equal_to_the_gathered_stream(tmp_path, codec, dtype):
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(5, 256, 24)).astype(np.float32) * 3 + 1
    calibration = {"acts": Calibration(np.full(24, 1.0), np.full(24, 3.0), 1.0)}
    writer = StoreWriter(
        tmp_path, {"acts": 24}, dtype, 256, chunk_bytes=2048, codec=codec, calibration=calibration
    )
    for item, part in enumerate(rows):
        writer.write_item(item, part)
    writer.finalise()
    store = open_store(tmp_path)
    gathered = ShuffledStream(store, ["acts"], **ORDER)
    staged = StagedStream(store, ["acts"], **ORDER)
    device_rows = DeviceRows(store, "acts", torch.device("cpu"))
    for _ in range(30):  # more than two epochs, with batches that span blocks
        expected = to_torch(gathered.next().arrays["acts"])
        found = device_rows.decode(device_rows.pick(staged.next()))
        if codec == "none":
            assert torch.equal(found, expected)
        else:
            torch.testing.assert_close(found.float(), expected.float(), rtol=0.01, atol=1e-5)
    gathered.close()
    staged.close()
