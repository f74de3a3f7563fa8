"""Test reading SAEs that the peers' own libraries wrote: the same mathematics, or a refusal."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.harness.peers import HOW_TO_MAKE, PEERS_PYTHON, peer_environment, peers_available
from sae_core.architectures.topk.settings import topk_settings
from sae_core.errors import CheckpointError
from sae_core.inference import load_sae
from tests.support.paths import ROOT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not peers_available(), reason=f".venv-peers not found; {HOW_TO_MAKE}"),
]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("peers")
    command = [str(PEERS_PYTHON), str(ROOT / "tests" / "support" / "peers" / "files.py"), str(root)]
    done = subprocess.run(
        command, env=peer_environment(), capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return root


def change_config(folder: Path, name: str, **values: Any) -> None:
    file = folder / name
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


@pytest.mark.parametrize(
    "name",
    [
        "saelens-plain",
        "saelens-rescaled",
        "saelens-TopKSAE",
        "saelens-StandardSAE",
        "saelens-JumpReLUSAE",
        "saelens-GatedSAE",
        "saelens-StandardSAE-unsubtracted",
        "saelens-JumpReLUSAE-unsubtracted",
        "saelens-GatedSAE-unsubtracted",
        "saelens-JumpReLUTrainingSAE",
        "AutoEncoderTopK",
        "AutoEncoder",
        "GatedAutoEncoder",
        "JumpReluAutoEncoder",
    ],
)
def test_a_file_computes_what_its_library_computes(written: Path, name: str) -> None:
    sae = load_sae(written / name, allow_pt=True)
    expected = load_file(written / name / "expected.safetensors")
    latents = sae.encode(expected["x"])
    torch.testing.assert_close(latents, expected["latents"], rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(sae.decode(latents), expected["recon"], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", ["AutoEncoder", "GatedAutoEncoder", "JumpReluAutoEncoder"])
def test_the_tensors_tell_the_class_without_a_config(
    written: Path, tmp_path: Path, name: str
) -> None:
    file = tmp_path / "ae.pt"
    shutil.copy(written / name / "ae.pt", file)
    expected = load_file(written / name / "expected.safetensors")
    latents = load_sae(file, allow_pt=True).encode(expected["x"])
    torch.testing.assert_close(latents, expected["latents"], rtol=1e-5, atol=1e-4)


def test_a_batchtopk_is_not_read_as_a_topk(written: Path, tmp_path: Path) -> None:
    """Its latents are those above a threshold: here about half as many again as k."""
    folder = written / "BatchTopKSAE"
    expected = load_file(folder / "expected.safetensors")
    assert (expected["latents"] > 0).sum(1).float().mean() > 10
    with pytest.raises(CheckpointError, match=r"dict_class='BatchTopKSAE': expected one of"):
        load_sae(folder, allow_pt=True)
    for name in ("BatchTopKSAE", "AutoEncoderTopK"):  # the same tensors
        file = tmp_path / name / "ae.pt"
        file.parent.mkdir()
        shutil.copy(written / name / "ae.pt", file)
        with pytest.raises(CheckpointError, match=r"config\.json not found"):
            load_sae(file, allow_pt=True)


def test_settings_that_change_the_mathematics_are_refused(written: Path, tmp_path: Path) -> None:
    for key, value in (
        ("signed", True),
        ("normalize_activations", "layer_norm"),
        ("reshape_activations", "hook_z"),
        ("architecture", "temporal"),
    ):
        folder = tmp_path / key
        shutil.copytree(written / "saelens-plain", folder)
        change_config(folder, "cfg.json", **{key: value})
        with pytest.raises(CheckpointError, match=key):
            load_sae(folder)


def test_a_whole_number_written_as_a_float_is_accepted(written: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(written / "saelens-plain", tmp_path / "float")
    change_config(folder, "cfg.json", k=7.0)
    assert topk_settings(load_sae(folder).config).k == 7
    change_config(folder, "cfg.json", k=7.5)
    with pytest.raises(CheckpointError, match=r"k=7\.5"):
        load_sae(folder)


def test_a_signed_sae_of_sparsify_is_refused(tmp_path: Path) -> None:
    tensors = {
        "encoder.weight": torch.ones(8, 4),
        "encoder.bias": torch.zeros(8),
        "W_dec": torch.ones(8, 4),
        "b_dec": torch.zeros(4),
    }
    save_file(tensors, tmp_path / "sae.safetensors")
    config = {"activation": "topk", "k": 2, "num_latents": 8, "d_in": 4, "multi_topk": False}
    (tmp_path / "cfg.json").write_text(json.dumps(config))
    assert topk_settings(load_sae(tmp_path).config).k == 2
    for key in ("signed", "transcode", "skip_connection", "made_up"):
        (tmp_path / "cfg.json").write_text(json.dumps({**config, key: True}))
        with pytest.raises(CheckpointError, match=key):
            load_sae(tmp_path)
