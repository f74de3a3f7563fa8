"""Test saving and loading SAEs, and that folding the input scale keeps reconstructions."""

from __future__ import annotations

import json

import pytest
import torch

from foundation.errors import ConfigError
from sae_core import SAE, load_sae
from sae_core.architectures.dictionary_init import random_unit_rows
from sae_core.architectures.topk.inference import TopKInference
from sae_core.config import TopKConfig
from sae_core.errors import CheckpointError, ShapeError
from sae_core.kernels import get_kernels
from tests.support.trainer_ranks import Job, SyntheticSource, run_job


def small() -> SAE:
    W = random_unit_rows(0, 40, 6, 0)
    config = TopKConfig(n_latents=40, k=3, hookpoint="model.layers.9")
    return TopKInference(
        config, W * 2, W, torch.linspace(-1, 1, 40), torch.arange(6.0), 7, {"a": 1}
    )


def test_save_and_load(tmp_path):
    sae, x = small(), torch.randn(5, 6)
    sae.save(tmp_path)
    again = load_sae(tmp_path)
    assert (again.config, again.step, again.metadata) == (sae.config, 7, {"a": 1})
    assert torch.equal(again(x), sae(x))
    (tmp_path / "sae.safetensors").write_bytes(b"short")
    with pytest.raises(CheckpointError, match="not a valid saved SAE"):
        load_sae(tmp_path)


def test_dense_and_sparse_agree_in_any_batch_shape():
    sae, x = small(), torch.randn(2, 3, 6)
    latents = sae.encode(x)
    assert latents.shape == (2, 3, 40)
    assert ((latents > 0).sum(-1) <= 3).all()
    torch.testing.assert_close(sae.decode(latents), sae(x))
    values, indices = sae.encode_topk(x)
    assert (values.diff(dim=-1) <= 0).all() and (values >= 0).all()
    assert torch.equal(latents.gather(-1, indices), values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_those_of_the_formulas(dtype):
    """Compare gradients of inputs, latents and weights with autograd through the dense formulas."""
    sae, x = small(), torch.randn(7, 6, generator=torch.Generator().manual_seed(3))
    for matrix in (sae.W_enc, sae.W_dec):
        matrix.data = matrix.data.to(dtype)
    sae.requires_grad_(True)
    weights = torch.randn(7, 6, generator=torch.Generator().manual_seed(4))
    results = []
    for dense in (False, True):
        sae.zero_grad(set_to_none=True)
        inputs = x.clone().requires_grad_(True)
        if dense:
            pre_acts = (inputs - sae.b_dec) @ sae.W_enc.float().T + sae.b_enc
            kept = torch.zeros_like(pre_acts).scatter(1, pre_acts.topk(3).indices, 1.0)
            recon = (pre_acts.relu() * kept) @ sae.W_dec.float() + sae.b_dec
        else:
            recon = sae(inputs)
        (recon * weights).sum().backward()
        results.append([inputs.grad, *(part.grad for part in sae.parameters())])
    error = 1e-5 if dtype == torch.float32 else 5e-2
    for found, expected in zip(*results, strict=True):
        assert found.abs().sum() > 0
        torch.testing.assert_close(found, expected, rtol=error, atol=error)
    latents = sae.encode(x).detach().requires_grad_(True)
    (sae.decode(latents) * weights).sum().backward()
    torch.testing.assert_close(latents.grad, weights @ sae.W_dec.float().T)


def test_without_gradients_nothing_is_recorded():
    sae, x = small(), torch.randn(5, 6)
    assert not sae(x).requires_grad
    with torch.no_grad():
        assert not sae(x.requires_grad_(True)).requires_grad
    with torch.inference_mode():
        assert sae(x).is_inference()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_of_the_memory(tmp_path, dtype):
    sae, x = small(), torch.randn(2, 50, 6)
    sae.save(tmp_path)
    half = load_sae(tmp_path, dtype=dtype)
    assert half.W_enc.dtype == half.W_dec.dtype == dtype and half.b_dec.dtype == torch.float32
    # Like the SAE whose weights are rounded, in float32.
    rounded = load_sae(tmp_path)
    for name in ("W_enc", "W_dec"):
        getattr(rounded, name).data = getattr(half, name).float()
    assert torch.equal(half.encode_topk(x)[1], rounded.encode_topk(x)[1])
    torch.testing.assert_close(half(x), rounded(x))
    torch.testing.assert_close(half.decode(half.encode(x)), rounded(x))
    assert half(x.to(dtype)).dtype == torch.float32
    cast = load_sae(tmp_path).to(dtype)  # rounds the vectors as well, and so selects otherwise
    assert cast(x).dtype == torch.float32
    assert ((cast(x) - half(x)).abs() < 0.1).float().mean() > 0.9
    assert load_sae(tmp_path, device="meta").W_enc.device.type == "meta"
    with pytest.raises(ConfigError, match=r"dtype=torch\.float64"):
        load_sae(tmp_path, dtype=torch.float64)


def test_the_kernels_follow_the_device_unless_they_were_chosen(monkeypatch):
    monkeypatch.setattr(
        "sae_core.inference.default_kernels", {"cpu": "stock", "meta": "reference"}.__getitem__
    )
    sae = small()
    assert sae.kernels.name == "stock" and sae.kernels is sae.kernels
    assert sae.to("meta").kernels.name == "reference"
    chosen = get_kernels("stock", torch.bfloat16)
    sae.kernels = chosen
    assert sae.kernels is chosen and small().kernels.name == "stock"


def test_wrong_width_and_wrong_folders_are_named(tmp_path):
    with pytest.raises(ShapeError, match=r"\(4, 7\): expected \[..., 6\]"):
        small()(torch.zeros(4, 7))
    with pytest.raises(CheckpointError, match="stage=train"):
        load_sae(tmp_path)
    (tmp_path / "sae.json").write_text(json.dumps({"config": {"nonsense": 1}}))
    with pytest.raises(CheckpointError, match="not a valid saved SAE"):
        load_sae(tmp_path)


@pytest.mark.distributed
def test_a_trained_checkpoint_reconstructs_raw_activations(tmp_path):
    rows = run_job(Job(str(tmp_path)))
    x = SyntheticSource(0, 1).rows(10_000)
    for path in (tmp_path, tmp_path / "checkpoints" / "step-00000050"):
        sae = load_sae(path)
        fvu = (x - sae(x)).square().sum() / (x - x.mean(0)).square().sum()
        assert float(fvu) == pytest.approx(rows[-1]["fvu"], rel=0.25)
        torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(250))
        assert sae.config.n_latents == 250 and sae.step == 50
