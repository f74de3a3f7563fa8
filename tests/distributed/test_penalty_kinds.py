"""Test that the kinds with a penalty train the same on every mesh, and resume exactly."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sae_core import load_sae
from sae_core.checkpoint.row_ranges import read_tensors
from tests.support.trainer_ranks import BATCH, N_LATENTS, Job, SyntheticSource, run_job

pytestmark = pytest.mark.distributed
STEPS = {"resampling": 60}
"""Steps of the kinds that need more than 30; half of the steps before and after the resume."""
KINDS: dict[str, dict[str, Any]] = {
    "jumprelu": {"architecture": "jumprelu", "overrides": {"l0_coef": 0.02}},
    "l0_target": {
        "architecture": "jumprelu",
        "overrides": {"l0_coef": 1.0, "l0_target": 6.0, "bandwidth": 0.3},
    },
    "relu": {"architecture": "relu", "overrides": {"l1_coef": 0.1}},
    "decoder_norm": {
        "architecture": "relu",
        "overrides": {"l1_coef": 0.1, "decoder_norm": "penalty"},
    },
    "resampling": {
        "architecture": "relu",
        "overrides": {
            "l1_coef": 60.0,
            "penalty_warmup_tokens": 0,
            "resample_every_tokens": 39 * BATCH + 1,  # rounded up to 40 batches
            "resample_warmup_tokens": 4 * BATCH,
            "dead_after_tokens": 2 * BATCH,
        },
    },
    "gated": {"architecture": "gated", "overrides": {"l1_coef": 0.1}},
}
OWN_METRICS = {
    "jumprelu": ["l0_penalty"],
    "l0_target": ["l0_penalty"],
    "relu": ["l1_penalty"],
    "decoder_norm": ["l1_penalty"],
    "resampling": ["l1_penalty"],
    "gated": ["l1_penalty", "gate_loss"],
}


def job(kind: str, folder: Path, **changes: Any) -> Job:
    settings = KINDS[kind]
    overrides = {"penalty_warmup_tokens": 20 * BATCH, **settings["overrides"]}
    steps = STEPS.get(kind, 30)
    basis = Job(str(folder), architecture=settings["architecture"], steps=steps)
    return replace(basis, save_every=steps // 2, overrides=overrides, **changes)


class Trained(dict[str, tuple[Path, list[Any]]]):
    """Folder and rows of each kind trained on one rank, which is done when first asked for."""

    def __init__(self, factory: pytest.TempPathFactory) -> None:
        self.factory = factory

    def __missing__(self, kind: str) -> tuple[Path, list[Any]]:
        folder = self.factory.mktemp(kind)
        self[kind] = folder, run_job(job(kind, folder))
        return self[kind]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return Trained(tmp_path_factory)


def tensors(folder: Path, steps: int) -> dict[str, torch.Tensor]:
    newest = folder / "checkpoints" / f"step-{steps:08d}"
    return read_tensors(newest / "weights") | read_tensors(newest / "optimizer")


@pytest.mark.parametrize("kind", sorted(KINDS.keys() - {"resampling"}))
def test_it_trains(trained, kind):
    _, rows = trained[kind]
    assert rows[-1]["fvu"] < 0.8 * rows[0]["fvu"]
    for name in OWN_METRICS[kind]:
        assert rows[-1][name] > 0


def test_dead_latents_are_resampled(trained, tmp_path):
    _, rows = trained["resampling"]
    dead = [row["dead_fraction"] for row in rows]
    # The step with index 40 resamples; row i is that of the step with index i.
    assert dead[39] > BATCH / N_LATENTS
    without = job("resampling", tmp_path)
    plain = run_job(
        replace(without, overrides={**without.overrides, "resample_every_tokens": None})
    )
    assert [row["loss"] for row in plain[:41]] == [row["loss"] for row in rows[:41]]
    # More latents are dead than the batch has rows, each of which revives one.
    assert plain[40]["dead_fraction"] - dead[40] == pytest.approx(BATCH / N_LATENTS)
    assert rows[41]["l0"] > 2 * plain[41]["l0"]
    shares = [a["lr"] / b["lr"] for a, b in zip(rows[1:], plain[1:], strict=True)]
    ramp = [0.1 + 0.45 * (1 - math.cos(math.pi * i / 4)) for i in (1, 2, 3)]
    wanted = [1.0] * 41 + ramp + [1.0] * 16
    assert shares == pytest.approx(wanted[1:])  # the first rate is 0


@pytest.mark.parametrize(("latent", "data", "zero"), [(2, 2, 0), (2, 2, 1), (3, 1, 0)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_mesh_trains_the_same(trained, tmp_path, kind, latent, data, zero):
    _, rows = trained[kind]
    meshed = run_job(job(kind, tmp_path, latent=latent, data=data, zero_stage=zero))
    for key in ("loss", "fvu", "l0", "dead_fraction", *OWN_METRICS[kind]):
        one, other = ([row[key] for row in each] for each in (rows, meshed))
        # Rounding may move a pre-activation over its threshold; before that, sums agree.
        assert one[:8] == pytest.approx(other[:8], rel=1e-5, abs=1e-9), key
        assert one == pytest.approx(other, rel=3e-3), key


@pytest.mark.parametrize("kind", KINDS)
def test_it_resumes_bit_for_bit_and_on_another_mesh(trained, tmp_path, kind):
    folder, rows = trained[kind]
    steps = STEPS.get(kind, 30)
    middle = str(folder / "checkpoints" / f"step-{steps // 2:08d}")
    again = run_job(job(kind, tmp_path / "same", resume=middle))
    assert [row["loss"] for row in again] == [row["loss"] for row in rows[steps // 2 :]]
    a, b = tensors(folder, steps), tensors(tmp_path / "same", steps)
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert torch.equal(tensor, b[name]), name
    other = run_job(job(kind, tmp_path / "other", resume=middle, latent=2, data=2, zero_stage=1))
    losses = [row["loss"] for row in other]
    assert losses == pytest.approx([row["loss"] for row in rows[steps // 2 :]], rel=3e-3)


@pytest.mark.parametrize("kind", sorted(KINDS.keys() - {"resampling"}))
def test_inference_computes_what_training_does(trained, tmp_path, kind):
    folder, rows = trained[kind]
    sae = load_sae(folder)
    x = SyntheticSource(0, 1).rows(STEPS.get(kind, 30))
    values, _ = sae.encode_topk(x)
    assert float((values > 0).sum(1).float().mean()) == pytest.approx(rows[-1]["l0"], rel=0.2)
    error = (x - sae(x)).square().sum() / (x - x.mean(0)).square().sum()
    assert float(error) == pytest.approx(rows[-1]["fvu"], rel=0.2)
    sae.save(tmp_path)
    assert torch.equal(load_sae(tmp_path).encode(x), sae.encode(x))
    resumed = Path(run_from(kind, tmp_path / "from", folder))
    first = run_rows(resumed)[0]
    assert first["fvu"] == pytest.approx(float(error), rel=0.3)


def run_from(kind: str, folder: Path, start: Path) -> Path:
    """Train a few steps from the trained SAE (`train.init_from`)."""
    folder.mkdir()
    run_job(job(kind, folder, init_from=str(start)))
    return folder


def run_rows(folder: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((folder / "rows.json").read_text())
    return rows
