"""Test that SAELens loads our exports of the kinds with a penalty, and computes the same."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from analysis.export import stage as export_stage
from benchmarks.harness.peers import HOW_TO_MAKE, PEERS_PYTHON, peer_environment, peers_available
from cluster.run_folder.files import HARVEST
from conf.schema.run import RunConfig
from sae_core.architectures.registry import ARCHITECTURES
from sae_core.inference import SAE, inference_class, load_sae
from tests.support.paths import ROOT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not peers_available(), reason=f".venv-peers not found; {HOW_TO_MAKE}"),
]
SCRIPT = ROOT / "tests" / "support" / "peers" / "outputs.py"
CLASSES = {"relu": "StandardSAE", "jumprelu": "JumpReLUSAE", "gated": "GatedSAE"}
L, D, ROWS = 96, 24, 48


def make_sae(kind: str) -> SAE:
    torch.manual_seed(0)
    config = ARCHITECTURES[kind].settings(n_latents=L, hookpoint="model.layers.9")
    vectors: dict[str, Any] = {
        vector.name: torch.rand(L) * (3.0 if vector.in_activation_units else 0.5)
        for vector in ARCHITECTURES[kind].vectors
    }
    W_enc, W_dec = torch.randn(L, D), torch.nn.functional.normalize(torch.randn(L, D), dim=1)
    b_enc, b_dec = torch.randn(L), 3 * torch.randn(D)
    return inference_class(config)(config, W_enc, W_dec, b_enc, b_dec, step=17, **vectors)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("exports")
    config = RunConfig()
    config.model.path, config.data.path = "org/model", "org/text"
    for kind in CLASSES:
        run_dir = root / kind
        sae = make_sae(kind)
        sae.save(run_dir)
        save_file({"x": sae.b_dec.data + torch.randn(ROWS, D)}, run_dir / "x.safetensors")
        (run_dir / HARVEST).write_text("{}")
        export_stage.run(config, run_dir)
    done = subprocess.run(
        [str(PEERS_PYTHON), str(SCRIPT), *(str(root / kind) for kind in CLASSES)],
        env=peer_environment(),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return root


@pytest.mark.parametrize("kind", CLASSES)
def test_saelens_computes_what_we_do(exported: Path, kind: str) -> None:
    folder = exported / kind
    theirs = load_file(folder / "peers.safetensors")
    facts = json.loads((folder / "peers.json").read_text())
    assert facts["saelens"]["class"] == CLASSES[kind]
    assert list(facts) == ["saelens"]  # the other formats cannot hold this kind
    sae, x = make_sae(kind), load_file(folder / "x.safetensors")["x"]
    latents = sae.encode(x)
    assert 0 < (latents > 0).float().mean() < 0.6
    expected = {"latents": latents, "decoded": sae.decode(latents), "recon": sae(x)}
    for name, ours in expected.items():
        error = (theirs[f"saelens.{name}"] - ours).abs().max() / ours.abs().max()
        assert float(error) <= 1e-5, name


@pytest.mark.parametrize("kind", CLASSES)
def test_the_export_is_read_back_the_same(exported: Path, kind: str) -> None:
    again, sae = load_sae(exported / kind / "export" / "saelens"), make_sae(kind)
    assert type(again) is type(sae) and again.config.n_latents == L
    for name, parameter in sae.named_parameters():
        assert torch.equal(dict(again.named_parameters())[name], parameter), name
