"""Train with the Triton kernels under Triton's interpreter, with the real trainer and real ranks.

On a GPU, `python -m benchmarks.gpu` does the same.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from sae_core.checkpoint.row_ranges import read_tensors
from tests.gpu.test_triton_encode import INTERPRETED
from tests.support.trainer_ranks import Job, run_job

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not INTERPRETED, reason="these ranks train on the CPU"),
]
STEPS = 12
TIMEOUT_S = 280.0


def job(folder: Path, kernels: str = "triton", **changes: Any) -> Job:
    folder.mkdir(exist_ok=True)
    settings: dict[str, Any] = {
        "steps": STEPS,
        "save_every": STEPS // 2,
        "prefilter": "none",
    } | changes
    # Few latents, because the interpreter needs a millisecond per program; some of them die early.
    settings["overrides"] = {"n_latents": 60, "dead_after_tokens": 96}
    return Job(str(folder), kernels=kernels, **settings)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    last = folder / "checkpoints" / f"step-{STEPS:08d}"
    return read_tensors(last / "weights") | read_tensors(last / "optimizer")


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("stock")
    return folder, run_job(job(folder, "stock"))


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("alone")
    return folder, run_job(job(folder), TIMEOUT_S)


def assert_like(rows: list[dict[str, Any]], others: list[dict[str, Any]]) -> None:
    for row, other in zip(rows, others, strict=True):
        for key in ("loss", "fvu", "auxk_loss", "grad_norm", "dead_fraction"):
            assert row[key] == pytest.approx(other[key], rel=1e-3, abs=1e-6), (key, row["step"])


def test_it_trains_like_the_stock_kernels(stock, alone):
    assert max(row["auxk_loss"] for row in stock[1]) > 0  # the auxiliary loss is active
    assert_like(alone[1], stock[1])


def test_two_latent_shards_and_two_replicas_train_like_one_rank(alone, tmp_path):
    assert_like(run_job(job(tmp_path / "mesh", latent=2, data=2), TIMEOUT_S), alone[1])


def test_a_resumed_run_has_the_same_bits(alone, tmp_path):
    """Its second half, in other processes, shows that every sum has a fixed order, too."""
    middle = alone[0] / "checkpoints" / f"step-{STEPS // 2:08d}"
    run_job(job(tmp_path / "resumed", resume=str(middle)), TIMEOUT_S)
    again = tensors(tmp_path / "resumed")
    for name, tensor in tensors(alone[0]).items():
        assert torch.equal(again[name], tensor), name
