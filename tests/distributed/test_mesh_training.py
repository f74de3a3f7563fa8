"""Test that sharded and replicated training matches one process, unless a part is broken."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from sae_core.checkpoint.folder import list_checkpoints
from sae_core.checkpoint.row_ranges import read_tensors
from tests.support.trainer_ranks import Job, RanksFailed, run_job

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("alone")
    return folder, run_job(Job(str(folder)))


def deviation(rows: list[dict[str, Any]], others: list[dict[str, Any]], key: str = "loss") -> float:
    tail = rows[len(rows) - len(others) :]
    assert [row["step"] for row in tail] == [row["step"] for row in others]
    pairs = [(a[key], b[key]) for a, b in zip(tail, others, strict=True)]
    return max(abs(a - b) / max(abs(a), 1e-9) for a, b in pairs)


def same_tensors(one: Path, other: Path) -> None:
    for part in ("weights", "optimizer"):
        a, b = read_tensors(one / part), read_tensors(other / part)
        assert a.keys() == b.keys()
        for name, tensor in a.items():
            assert torch.equal(tensor, b[name]), name


@pytest.mark.parametrize(
    ("latent", "data", "zero", "update"),
    [
        (2, 2, 0, "fused"),
        (2, 2, 0, "dense"),
        (2, 2, 1, "auto"),
        (3, 1, 0, "auto"),
        (1, 3, 1, "auto"),
    ],
)
def test_a_mesh_trains_like_one_rank(alone, tmp_path, latent, data, zero, update):
    _, rows = alone
    assert rows[-1]["fvu"] < 0.85 * rows[0]["fvu"]
    assert max(row["auxk_loss"] for row in rows) > 0  # the auxiliary loss is active
    meshed = run_job(Job(str(tmp_path), latent, data, zero, update))
    assert deviation(rows, meshed) < 1e-4
    assert deviation(rows, meshed, "grad_norm") < 1e-3
    assert [row["l0"] for row in rows] == pytest.approx([row["l0"] for row in meshed], abs=0.05)


def test_the_reference_kernels_train_the_same(alone, tmp_path):
    assert deviation(alone[1], run_job(Job(str(tmp_path), kernels="reference"))) < 1e-4


def test_the_fused_update_equals_the_dense_one(alone, tmp_path):
    folder, rows = alone
    dense = run_job(Job(str(tmp_path), update="dense"))
    assert deviation(rows, dense) < 1e-6
    for part in ("weights", "optimizer"):
        a = read_tensors(folder / "checkpoints" / "step-00000050" / part)
        b = read_tensors(tmp_path / "checkpoints" / "step-00000050" / part)
        for name, tensor in a.items():
            torch.testing.assert_close(tensor, b[name], atol=1e-6, rtol=1e-4, msg=name)


@pytest.mark.parametrize(("latent", "data"), [(2, 1), (1, 2)])
def test_aux_rows_are_the_same_rows_on_a_mesh(alone, tmp_path, latent, data):
    part = {"auxk_rows": 0.25}
    rows = run_job(Job(str(tmp_path / "alone"), overrides=part))
    meshed = run_job(Job(str(tmp_path / "mesh"), latent, data, overrides=part))
    assert deviation(rows, meshed) < 1e-4
    assert deviation(rows, meshed, "auxk_loss") < 1e-4
    assert deviation(alone[1], rows) > 1e-4  # a quarter of the rows gives another estimate


@pytest.mark.parametrize(("latent", "data"), [(1, 1), (2, 1), (2, 2)])
def test_bfloat16_moments_resume_exactly_and_on_other_meshes(tmp_path, latent, data):
    rows = run_job(Job(str(tmp_path / "alone"), moments="bfloat16"))
    checkpoint = tmp_path / "alone" / "checkpoints" / "step-00000025"
    stored = read_tensors(checkpoint / "optimizer")
    assert stored["sae.W_enc.exp_avg_sq"].dtype == torch.bfloat16
    job = Job(str(tmp_path / "on"), latent, data, moments="bfloat16", resume=str(checkpoint))
    resumed = run_job(job)
    if (latent, data) == (1, 1):
        assert [row["loss"] for row in resumed] == [row["loss"] for row in rows[25:]]
    assert deviation(rows, resumed) < 1e-3  # rounding differs between meshes


def test_a_prefilter_trains_the_same(alone, tmp_path):
    plain = run_job(Job(str(tmp_path / "plain"), prefilter="none"))
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        filtered = run_job(Job(str(tmp_path / "filtered"), prefilter="bfloat16x3"))
        assert deviation(plain, filtered) < 1e-5
    assert deviation(plain, alone[1]) < 1e-5


@pytest.mark.parametrize(
    ("latent", "data", "update", "zero", "breakage"),
    [
        (2, 1, "auto", 0, "global selection"),
        (2, 1, "auto", 0, "reconstruction all-reduce"),
        (2, 1, "dense", 0, "sharded mark"),
        (1, 2, "auto", 0, "fired all-reduce"),
        (1, 2, "auto", 0, "replica exchange"),
        (1, 2, "dense", 0, "gradient average"),
        (1, 2, "auto", 1, "zero push"),
    ],
)
def test_the_comparison_detects_a_disabled_part(
    alone, tmp_path, latent, data, update, zero, breakage
):
    _, rows = alone
    meshed = run_job(Job(str(tmp_path), latent, data, zero, update, breakage=breakage))
    worst = max(deviation(rows, meshed), deviation(rows, meshed, "grad_norm"))
    assert worst > 1e-3, worst


@pytest.mark.parametrize(
    ("latent", "data", "zero"), [(1, 1, 0), (2, 1, 0), (3, 1, 0), (4, 1, 0), (2, 2, 1)]
)
def test_resume_on_any_mesh(alone, tmp_path, latent, data, zero):
    folder, rows = alone
    checkpoint = folder / "checkpoints" / "step-00000025"
    resaved = tmp_path / "resaved"
    run_job(Job(str(resaved), latent, data, zero, resume=str(checkpoint), steps=25))
    same_tensors(checkpoint, list_checkpoints(resaved / "checkpoints")[0])

    resumed = run_job(Job(str(tmp_path / "on"), latent, data, zero, resume=str(checkpoint)))
    assert resumed[0]["step"] == 26
    assert abs(resumed[0]["loss"] / rows[25]["loss"] - 1) < 1e-5
    assert deviation(rows, resumed) < 1e-4
    if (latent, data) == (1, 1):
        assert [row["loss"] for row in resumed] == [row["loss"] for row in rows[25:]]
        same_tensors(
            folder / "checkpoints" / "step-00000050",
            tmp_path / "on" / "checkpoints" / "step-00000050",
        )


def test_a_checkpoint_of_a_mesh_opens_on_one_rank(alone, tmp_path):
    _, rows = alone
    run_job(Job(str(tmp_path / "mesh"), 2, 2, 1, steps=25))
    checkpoint = tmp_path / "mesh" / "checkpoints" / "step-00000025"
    resumed = run_job(Job(str(tmp_path / "on"), resume=str(checkpoint)))
    # The decay depends on the run's length, so the 25-step run ends with another learning rate.
    assert abs(resumed[0]["loss"] / rows[25]["loss"] - 1) < 0.05


@pytest.mark.parametrize(
    ("zero", "clip_norm", "update"),
    [(0, 0.3, "fused"), (0, 0.0, "fused"), (0, 0.0, "dense"), (1, 0.3, "auto"), (1, 0.0, "auto")],
)
def test_an_infinite_gradient_with_a_finite_loss_stops_training(tmp_path, zero, clip_norm, update):
    job = Job(str(tmp_path), 1, 2, zero, update, clip_norm=clip_norm, poison_gradient_step=30)
    with pytest.raises(RanksFailed) as failed:
        run_job(job)
    assert str(failed.value).count("loss or gradient of step 30 is not finite") == 2
    assert str(failed.value).count("step 30 changed nothing") == 2
    assert [path.name for path in list_checkpoints(tmp_path / "checkpoints")] == ["step-00000025"]


@pytest.mark.parametrize(("latent", "data", "zero"), [(2, 1, 0), (1, 2, 0), (1, 2, 1)])
def test_a_bad_row_on_one_rank_stops_all_before_the_update(tmp_path, latent, data, zero):
    rank = 1 if data > 1 else 0
    job = Job(str(tmp_path), latent, data, zero, poison_step=30, poison_rank=rank)
    with pytest.raises(RanksFailed) as failed:
        run_job(job)
    text = str(failed.value)
    assert text.count("NonFiniteLossError: sae: loss or gradient of step 30") == latent * data
    assert text.count("step 30 changed nothing") == latent * data
    assert [path.name for path in list_checkpoints(tmp_path / "checkpoints")] == ["step-00000025"]


@pytest.mark.parametrize(
    ("latent", "data", "zero", "update"),
    [(2, 1, 0, "fused"), (2, 1, 0, "dense"), (1, 2, 0, "fused"), (1, 2, 1, "auto")],
)
def test_an_infinite_loss_on_one_rank_stops_all_before_the_update(
    tmp_path, latent, data, zero, update
):
    """All gradients are finite, so only the loss on rank 1 can stop the other rank."""
    job = Job(str(tmp_path), latent, data, zero, update, poison_loss_step=30, poison_rank=1)
    with pytest.raises(RanksFailed) as failed:
        run_job(job)
    text = str(failed.value)
    assert text.count("NonFiniteLossError: sae: loss or gradient of step 30") == 2, text
    assert text.count("step 30 changed nothing") == 2
    assert [path.name for path in list_checkpoints(tmp_path / "checkpoints")] == ["step-00000025"]
