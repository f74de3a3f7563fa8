"""Test that asynchronous kernels, which keep pairs in slots, train like those that do not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from sae_core.checkpoint.row_ranges import read_tensors
from tests.support.trainer_ranks import Job, run_job

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def compact(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("compact")
    return folder, run_job(Job(str(folder), prefilter="none"))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return read_tensors(folder / "checkpoints" / "step-00000050" / "weights")


@pytest.mark.parametrize(
    ("latent", "data", "update", "clip_norm"),
    [
        (1, 1, "fused", 0.3),
        (1, 2, "fused", 0.3),
        (2, 2, "fused", 0.3),
        (2, 1, "dense", 0.3),
        (2, 2, "fused", 0.0),
    ],
)
def test_slots_train_like_compact_pairs(compact, tmp_path, latent, data, update, clip_norm):
    folder, rows = compact
    if not clip_norm:
        folder = tmp_path / "unclipped"
        folder.mkdir()
        rows = run_job(Job(str(folder), prefilter="none", clip_norm=0.0))
    assert max(row["auxk_loss"] for row in rows) > 0  # the auxiliary loss is active
    other = tmp_path / "slots"
    other.mkdir()
    job = Job(str(other), latent, data, update=update, kernels="slotted", clip_norm=clip_norm)
    for row, ours in zip(rows, run_job(job), strict=True):
        for key in ("loss", "fvu", "auxk_loss", "grad_norm", "dead_fraction", "lr"):
            assert ours[key] == pytest.approx(row[key], rel=1e-3, abs=1e-6), (key, row["step"])
        assert ours["l0"] == pytest.approx(row["l0"], abs=0.05)
    for name, tensor in weights(folder).items():
        torch.testing.assert_close(weights(other)[name], tensor, rtol=1e-3, atol=1e-4)


def test_a_bad_gradient_ends_training_without_clipping_too(tmp_path):
    """Without clipping, the update itself computes the norm."""
    from tests.support.trainer_ranks import RanksFailed

    job = Job(str(tmp_path), kernels="slotted", clip_norm=0.0, poison_step=7)
    with pytest.raises(RanksFailed, match="step 7 is not finite"):
        run_job(job)
