"""Test the input maps: folded exactly, resumed bit for bit, better on dominant channels."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sae_core import load_sae
from sae_core.checkpoint.folder import list_checkpoints
from sae_core.checkpoint.row_ranges import read_tensors
from sae_core.errors import ShapeError
from sae_core.training.input_transform import channel_scales, report_of, whitening
from tests.support.ranks import Ranks
from tests.support.trainer_ranks import D, Job, SyntheticSource, config_of, run_job

pytestmark = pytest.mark.distributed

LOUD = 30.0
"""Factor of the two dominant channels of `LoudSource`."""


class LoudSource(SyntheticSource):
    """Synthetic rows in which two channels have far more variance than the others."""

    def rows(self, index: int) -> torch.Tensor:
        x = super().rows(index)
        x[:, :2] *= LOUD
        return x


def newest(folder: Path) -> Path:
    return list_checkpoints(folder / "checkpoints")[0]


def mapped(x: torch.Tensor, weights: dict[str, torch.Tensor]) -> torch.Tensor:
    map_ = weights["input_map"].double()
    centred = x.double() - weights["input_center"]
    return centred * map_ if map_.ndim == 1 else centred @ map_


def unmapped(y: torch.Tensor, weights: dict[str, torch.Tensor]) -> torch.Tensor:
    map_ = weights["input_map"].double()
    inverse = 1 / map_ if map_.ndim == 1 else torch.linalg.inv(map_)
    return (y * inverse if map_.ndim == 1 else y @ inverse) + weights["input_center"]


@pytest.mark.parametrize("transform", ["per_channel", "whiten"])
def test_the_loaded_sae_computes_what_training_did(tmp_path: Path, transform: str) -> None:
    job = Job(str(tmp_path), latent=2, overrides={"input_transform": transform})
    run_job(job)
    tensors = read_tensors(newest(tmp_path) / "weights")
    w = {name.split(".", 1)[1]: tensor for name, tensor in tensors.items()}
    assert w["input_map"].shape == ((D,) if transform == "per_channel" else (D, D))
    raw = SyntheticSource(0, 1).rows(77)
    # As in training, in double precision.
    x = (mapped(raw, w) - w["input_mean"]) * w["input_scale"]
    pre_acts = (x - w["b_dec"]) @ w["W_enc"].double().T + w["b_enc"]
    values, latents = pre_acts.topk(6)
    values = values.relu()
    dense = torch.zeros_like(pre_acts).scatter(1, latents, values)
    recon = dense @ w["W_dec"].double() + w["b_dec"]
    recon_raw = unmapped(recon / w["input_scale"] + w["input_mean"], w)

    sae = load_sae(tmp_path)
    torch.testing.assert_close(sae(raw).double(), recon_raw, rtol=1e-4, atol=1e-4)
    encoded = sae.encode(raw).double() * w["input_scale"]
    torch.testing.assert_close(encoded, dense, rtol=1e-4, atol=1e-4)
    # Without the map, or with it twice, the latents would be others.
    assert not torch.allclose(encoded, dense * 1.05, atol=1e-3)
    # The row norms of the decoder are those of the map, not 1.
    assert not torch.allclose(sae.W_dec.norm(dim=1), torch.ones(len(sae.W_dec)), atol=0.05)


def test_a_resumed_run_keeps_its_map(tmp_path: Path) -> None:
    whole, part = tmp_path / "whole", tmp_path / "part"
    overrides = {"input_transform": "whiten"}
    for folder, resume in ((whole, None), (part, whole / "checkpoints" / "step-00000025")):
        folder.mkdir()
        job = Job(str(folder), overrides=overrides, resume=str(resume) if resume else None)
        run_job(job)
    one, other = (read_tensors(newest(folder) / "weights") for folder in (whole, part))
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def _train_loud(folder: str, transform: str, n_steps: int) -> int:
    import torch.distributed as dist

    from sae_core.distributed.mesh import Mesh
    from sae_core.training.lockstep import train_to_end
    from sae_core.training.trainer import Trainer

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    root = Path(folder) / "checkpoints"
    root.mkdir()
    overrides = {"input_transform": transform}
    config = config_of(Job(folder, steps=n_steps, save_every=10**6, overrides=overrides))
    mesh = Mesh.create("cpu", 1, 1)
    trainer = Trainer(config, mesh, LoudSource(0, 1), root, 3, lambda row: None, 10**6)
    trainer.calibrate()
    print("proposal:", trainer.inputs and trainer.inputs.proposal(transform), flush=True)
    train_to_end(trainer)
    dist.destroy_process_group()
    return 0


def test_loud_channels_take_over_unless_they_are_mapped(tmp_path: Path) -> None:
    quiet_fvu, proposed = {}, {}
    rows = torch.cat([LoudSource(0, 1).rows(10_000 + i) for i in range(40)])
    for transform in ("scale", "per_channel", "whiten"):
        folder = tmp_path / transform
        ranks = Ranks(folder, 1, _train_loud, str(folder), transform, 400)
        assert ranks.codes() == [0], ranks.logs()
        proposal = "proposal: the 5% of the channels with the most variance"
        proposed[transform] = proposal in ranks.logs()[0]
        sae = load_sae(folder)
        error = (sae(rows) - rows)[:, 2:].square().sum()
        quiet_fvu[transform] = float(error / (rows - rows.mean(0))[:, 2:].square().sum())
    assert quiet_fvu["per_channel"] < 0.6 * quiet_fvu["scale"]
    assert quiet_fvu["whiten"] < 0.6 * quiet_fvu["scale"]
    assert proposed == {"scale": True, "per_channel": False, "whiten": False}


def test_maps_make_channels_equal() -> None:
    rows = torch.cat([LoudSource(0, 1).rows(i) for i in range(100)])
    spread = (rows - rows.mean(0)) * channel_scales(rows)
    torch.testing.assert_close(spread.std(0, correction=0), torch.ones(D))
    white = (rows - rows.mean(0)) @ whitening(rows, 1e-9)
    torch.testing.assert_close(white.T @ white / len(rows), torch.eye(D), atol=1e-3, rtol=0)
    # epsilon bounds the amplification of directions of little variance.
    variance = rows.double().var(0, correction=0).mean()
    most = torch.linalg.eigvalsh(whitening(rows, 0.01).double())[-1]
    assert float(most) <= float((0.01 * variance).rsqrt()) * 1.001
    constant = rows.clone()
    constant[:, 3] = 7.0
    assert torch.isfinite(channel_scales(constant)).all()
    with pytest.raises(ShapeError, match=r"23 rows: expected at least 24,.*train\.sample_tokens"):
        whitening(rows[:23], 1e-3)


def test_the_report_of_equal_and_of_loud_channels() -> None:
    generator = torch.Generator().manual_seed(0)
    even = torch.randn(4000, 40, generator=generator) + 3
    report = report_of(even)
    assert report.mean_to_spread == pytest.approx(3, rel=0.05)
    assert report.loud_variance == pytest.approx(0.05, rel=0.2)
    assert report.loudest_to_median == pytest.approx(1, rel=0.1)
    assert report.proposal("scale") is None
    even[:, 7] *= 30
    loud = report_of(even)
    assert loud.loud_variance > 0.9 and loud.loudest_to_median > 25
    assert "per_channel" in str(loud.proposal("scale")) and loud.proposal("whiten") is None
