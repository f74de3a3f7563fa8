"""Test that a device gathers the same rows as the host."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from activation_store import (
    CODECS,
    Calibration,
    ShuffledStream,
    StagedStream,
    StoreWriter,
    open_store,
)
from cluster.training.device_gather import DeviceRows, decodes_on_device, to_torch
from tests.support.store_cases import calibration, write_store
from tests.support.toys.codec import Halves

ORDER: dict[str, Any] = {"seed": 3, "batch_rows": 96, "window_items": 2, "buffer_rows": 300}


@pytest.fixture(autouse=True)
def toy():
    with CODECS.registered("halves", Halves()):
        yield


@pytest.mark.parametrize("codec", ["none", "int8", "halves"])
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
    assert decodes_on_device(store, "acts")
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


def test_rows_that_only_the_host_can_decode(tmp_path):
    arrays = {"a": 6}
    with CODECS.registered("host", Halves(host_only=True)):
        write_store(tmp_path, [16], arrays=arrays, codec="host", calibration=calibration(arrays))
        store = open_store(tmp_path)
        # `tests/gpu/fake_cuda` shows that these rows are gathered on the host and uploaded.
        assert not decodes_on_device(store, "a")
