"""Test that an architecture and a kernel body from outside the packages train like those inside."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from foundation.errors import ConfigError
from sae_core import load_sae
from sae_core.checkpoint.folder import newest_valid
from sae_core.checkpoint.row_ranges import read_tensors
from sae_core.checkpoint.verify import checkpoint_problems
from tests.support.toys.architecture import ToyConfig, ToyInference, registered_toys
from tests.support.trainer_ranks import Job, SyntheticSource, run_job

pytestmark = pytest.mark.distributed
STEPS = 30


def toy(folder: Path, **changes: object) -> Job:
    return replace(Job(str(folder), architecture="toy", steps=STEPS, save_every=15), **changes)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("trained")
    return folder, run_job(toy(folder))


@pytest.fixture(autouse=True)
def _toys() -> Iterator[None]:
    with registered_toys():
        yield


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    newest = folder / "checkpoints" / f"step-{STEPS:08d}"
    return read_tensors(newest / "weights") | read_tensors(newest / "optimizer")


def same(one: Path, other: Path) -> None:
    a, b = tensors(one), tensors(other)
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert torch.equal(tensor, b[name]), name


def test_it_trains_with_its_own_metric_and_parameter(trained):
    folder, rows = trained
    assert rows[-1]["fvu"] < 0.8 * rows[0]["fvu"]
    assert rows[-1]["size"] > 0 and "auxk_loss" not in rows[-1]
    threshold = tensors(folder)["sae.threshold"]
    assert threshold.shape == (250,) and not torch.allclose(threshold, torch.tensor(0.1))


def test_calibration_matches_the_norm_of_the_inputs(trained):
    _, rows = trained
    # An encoder that is not scaled reconstructs almost nothing, or far too much.
    assert 0.2 < rows[0]["fvu"] < 1.2


def test_it_resumes_bit_for_bit(trained, tmp_path):
    folder, rows = trained
    middle = str(folder / "checkpoints" / "step-00000015")
    again = run_job(toy(tmp_path, resume=middle))
    assert [row["loss"] for row in again] == [row["loss"] for row in rows[15:]]
    same(folder, tmp_path)


@pytest.mark.parametrize(("latent", "data", "zero"), [(2, 2, 0), (1, 2, 1)])
def test_it_trains_on_a_mesh(trained, tmp_path, latent, data, zero):
    _, rows = trained
    meshed = run_job(toy(tmp_path, latent=latent, data=data, zero_stage=zero))
    for key in ("loss", "fvu", "size", "l0", "dead_fraction"):
        one, other = ([row[key] for row in each] for each in (rows, meshed))
        assert one == pytest.approx(other, rel=1e-3), key


def test_load_sae_encodes_and_decodes_with_it(trained, tmp_path):
    folder, rows = trained
    newest = newest_valid(folder / "checkpoints")
    assert newest is not None and checkpoint_problems(newest) == []
    sae = load_sae(folder)
    assert type(sae) is ToyInference and type(sae.config) is ToyConfig
    x = SyntheticSource(0, 1).rows(STEPS)
    values, latents = sae.encode_topk(x)
    dense = sae.encode(x)
    assert torch.equal(dense.gather(1, latents), values) and (dense >= 0).all()
    torch.testing.assert_close(sae.decode_topk(values, latents), sae.decode(dense))
    error = (x - sae(x)).square().sum() / (x - x.mean(0)).square().sum()
    assert float(error) == pytest.approx(
        rows[-1]["fvu"], rel=0.2
    )  # the thresholds are in raw units as well
    w = {name.removeprefix("sae."): tensor for name, tensor in tensors(folder).items()}
    centred = (x - w["input_mean"]) * w["input_scale"] - w["b_dec"]
    in_training = (centred @ w["W_enc"].T + w["b_enc"] - w["threshold"]).relu()
    torch.testing.assert_close(dense * w["input_scale"], in_training, atol=1e-4, rtol=1e-4)
    sae.save(tmp_path)
    assert json.loads((tmp_path / "sae.json").read_text())["config"]["architecture"] == "toy"
    assert torch.equal(load_sae(tmp_path).encode(x), dense)


def test_an_architecture_that_is_not_installed_is_named(trained, monkeypatch):
    folder, _ = trained
    from sae_core.architectures.registry import ARCHITECTURES

    monkeypatch.delitem(ARCHITECTURES._members, "toy")
    with pytest.raises(ConfigError, match=r"sae.architecture='toy': expected one of: topk"):
        load_sae(folder)


def test_kernels_with_copies_train_and_resume_like_those_without(tmp_path):
    job = Job(str(tmp_path / "stock"), steps=STEPS, save_every=15, prefilter="none")
    copying = replace(job, folder=str(tmp_path / "copying"), kernels="copying")
    stock = run_job(job)
    assert [row["loss"] for row in run_job(copying)] == [row["loss"] for row in stock]
    middle = str(tmp_path / "copying" / "checkpoints" / "step-00000015")
    run_job(replace(copying, folder=str(tmp_path / "again"), resume=middle))
    same(tmp_path / "stock", tmp_path / "again")
