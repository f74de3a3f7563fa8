"""Test that stores and checkpoints written by an earlier version (November 2026) still open."""

from __future__ import annotations

import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch

from activation_store import open_store, verify_store
from sae_core import load_sae
from tests.support.paths import ROOT
from tests.support.single_rank import train

GOLDEN = ROOT / "tests" / "golden" / "before_rooms"
D, ITEMS, ROWS = 8, 3, 256


def written_rows() -> np.ndarray:
    """Return the rows [ITEMS * ROWS, D] that were written to all stores, in float32."""
    directions = np.random.default_rng(5).normal(size=(24, D)).astype(np.float32)
    items = []
    for item in range(ITEMS):
        rng = np.random.default_rng([11, item])
        weights = rng.random((ROWS, 24)) * (rng.random((ROWS, 24)) < 0.1)
        items.append((weights @ directions).astype(np.float32))
    return np.concatenate(items)


@pytest.fixture
def golden(tmp_path: Path) -> Path:
    """Copy the golden folder: opening must not depend on its place, and may write to it."""
    return Path(shutil.copytree(GOLDEN, tmp_path / "golden"))


@pytest.mark.parametrize("name", ["float32", "bfloat16", "blosc", "int8"])
def test_a_store_reads_the_rows_that_were_written(golden, name):
    store = open_store(golden / f"store-{name}")
    assert store.finalised and store.n_tokens == ITEMS * ROWS
    expected = written_rows()
    rows = store.read("acts", 0, store.n_tokens).astype(np.float32)
    if name == "float32":
        np.testing.assert_allclose(rows, expected, rtol=1e-6, atol=1e-7)
    elif name == "int8":
        scale = np.abs(expected).max(1, keepdims=True)
        # One step of 127, then bfloat16.
        assert (np.abs(rows - expected) <= scale * (1 / 127 + 2.0**-8)).all()
    else:
        rounded = expected.astype(ml_dtypes.bfloat16).astype(np.float32)
        np.testing.assert_allclose(rows, rounded, rtol=2.0**-7, atol=0)
        assert (rows == rounded).mean() > 0.999
    documents = store.read("document", 0, store.n_tokens)
    assert (documents == np.repeat(np.arange(ITEMS), ROWS)).all()
    assert verify_store(golden / f"store-{name}") == []


def test_a_checkpoint_loads(golden):
    sae = load_sae(golden / "run")
    rows = torch.from_numpy(written_rows())
    values, latents = sae.encode_topk(rows)
    assert values.shape == latents.shape == (ITEMS * ROWS, 4)
    error = (rows - sae.decode_topk(values, latents)).square().sum()
    fvu = float(error / (rows - rows.mean(0)).square().sum())
    assert fvu == pytest.approx(0.36, abs=0.04)  # metrics.jsonl says 0.366 at the last step


@pytest.mark.distributed
def test_a_run_resumes_to_the_weights_that_it_had(golden):
    run = golden / "run"
    expected = load_sae(run)
    shutil.rmtree(run / "checkpoints" / "step-00000020")
    (run / "checkpoints" / "latest").write_text('"step-00000010"')
    config = (run / "config.yaml").read_text()
    config = config.replace("RUNS", str(golden)).replace("STORE", str(golden / "store-float32"))
    (run / "config.yaml").write_text(config)
    (run / "logs").mkdir()
    printed = train(run)
    assert "train 20/20" in printed and "train 5/20" not in printed
    found = load_sae(run)
    for name in ("W_enc", "W_dec", "b_enc", "b_dec"):
        # The last bits depend on the processor that multiplied the matrices.
        torch.testing.assert_close(
            getattr(found, name), getattr(expected, name), rtol=1e-4, atol=1e-5
        )
