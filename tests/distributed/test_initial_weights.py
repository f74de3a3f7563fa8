"""Start training from another SAE: its reconstructions, in every input transform and mesh."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sae_core import load_sae
from sae_core.checkpoint.folder import list_checkpoints
from sae_core.checkpoint.row_ranges import read_tensors
from tests.support.trainer_ranks import N_LATENTS, D, Job, RanksFailed, SyntheticSource, run_job

pytestmark = pytest.mark.distributed
Trained = tuple[Path, float, float]
"""Folder of a trained SAE, and the FVU of its first and last steps."""


def job(folder: Path, transform: str, **settings: object) -> Job:
    return Job(str(folder), overrides={"input_transform": transform}, steps=20, **settings)  # type: ignore[arg-type]


@pytest.fixture(scope="module", params=["scale", "whiten"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder: Path = tmp_path_factory.mktemp(request.param)
    rows = run_job(Job(str(folder), overrides={"input_transform": request.param}, steps=150))
    first, last = (float(rows[i]["fvu"]) for i in (0, -1))
    assert last < 0.9 * first
    return folder, first, last


@pytest.mark.parametrize("transform", ["scale", "per_channel", "whiten"])
def test_the_first_step_has_the_error_of_the_other_sae(
    trained: Trained, tmp_path: Path, transform: str
) -> None:
    folder, random, _ = trained
    mesh = {"latent": 2, "data": 2} if transform == "scale" else {}
    rows = run_job(job(tmp_path, transform, init_from=str(folder), **mesh))
    sae, x = load_sae(folder), SyntheticSource(0, 1).rows(0)
    if sae.config.input_transform == transform:  # the error is measured in mapped activations
        weights = read_tensors(list_checkpoints(folder / "checkpoints")[0] / "weights")
        map_ = next((w for name, w in weights.items() if name.endswith("input_map")), torch.eye(D))
        error = ((x - sae(x)) @ map_).square().sum()
        fvu = float(error / ((x - x.mean(0)) @ map_).square().sum())
        assert rows[0]["fvu"] == pytest.approx(fvu, rel=1e-3)
    # Other maps weigh the channels, and so the error and the selection, differently.
    assert rows[0]["fvu"] < random


def test_a_saved_sae_is_a_start(trained: Trained, tmp_path: Path) -> None:
    folder, _, _ = trained
    load_sae(folder).save(tmp_path / "saved")
    transform = load_sae(folder).config.input_transform
    starts = [folder, tmp_path / "saved"]
    runs = []
    for number, start in enumerate(starts):
        (tmp_path / str(number)).mkdir()
        runs.append(run_job(job(tmp_path / str(number), transform, init_from=str(start))))
    first, second = runs
    assert first[0]["fvu"] == pytest.approx(second[0]["fvu"], rel=1e-4)


def test_an_sae_of_another_size_is_refused(trained: Trained, tmp_path: Path) -> None:
    small = load_sae(trained[0])
    small.config.n_latents = 40
    for name in ("W_enc", "W_dec", "b_enc"):
        setattr(small, name, torch.nn.Parameter(getattr(small, name)[:40].clone()))
    small.save(tmp_path / "small")
    with pytest.raises(RanksFailed, match=rf"train\.init_from=.*n_latents={N_LATENTS}.*has .*40"):
        run_job(job(tmp_path, "scale", init_from=str(tmp_path / "small")))
