"""Test that the peers' libraries load our exports and agree within 1e-5 of the largest value."""

from __future__ import annotations

import itertools
import json
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file

from analysis.export import stage as export_stage
from benchmarks.harness.peers import HOW_TO_MAKE, PEERS_PYTHON, peer_environment, peers_available
from cluster.run_folder.files import HARVEST
from conf.schema.run import RunConfig
from sae_core.architectures.topk.inference import TopKInference
from sae_core.config import TopKConfig
from sae_core.errors import CheckpointError
from sae_core.inference import SAE, load_sae
from tests.support.paths import ROOT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not peers_available(), reason=f".venv-peers not found; {HOW_TO_MAKE}"),
]
SCRIPT = ROOT / "tests" / "support" / "peers" / "outputs.py"
PEERS = ["saelens", "sparsify", "dictionary_learning"]
TOLERANCE = 1e-5
ROWS = 48


class Case(NamedTuple):
    """A dictionary to export: L latents, width D, k active, activations of size `scale`."""

    seed: int
    L: int
    D: int
    k: int
    scale: float

    @property
    def name(self) -> str:
        return f"seed{self.seed}-L{self.L}-D{self.D}-k{self.k}-scale{self.scale:g}"


# The cases include L = D, and k = 1 and k = L - 1 as the extremes, and a single latent or column.
# With L = D alone, a missing transposition would go unnoticed.
CASES = [
    Case(seed, L, D, k, scale)
    for seed, ((L, D, k), scale) in enumerate(
        itertools.product(
            [(96, 24, 7), (32, 32, 1), (40, 16, 39), (1, 8, 1), (2, 1, 1)], [1.0, 0.01, 300.0]
        )
    )
]


def make_sae(case: Case) -> SAE:
    """Make an SAE with random weights and large biases, as for activations centred on b_dec."""
    torch.manual_seed(case.seed)
    W_enc = torch.randn(case.L, case.D)
    W_dec = torch.nn.functional.normalize(torch.randn(case.L, case.D), dim=1)
    if case.scale == 300.0:  # rows have other norms if a map of the inputs was folded into them
        W_dec *= 0.2 + 3 * torch.rand(case.L, 1)
    b_enc, b_dec = torch.randn(case.L) * case.scale, torch.randn(case.D) * 3 * case.scale
    config = TopKConfig(n_latents=case.L, k=case.k, hookpoint="model.layers.9")
    return TopKInference(config, W_enc, W_dec, b_enc, b_dec, step=17)


def rows_without_ties(sae: SAE, case: Case) -> torch.Tensor:
    """Return rows with a gap after the k-th pre-activation, so that rounding selects nothing."""
    x = sae.b_dec + case.scale * torch.randn(8 * ROWS, case.D)
    if case.k == case.L:
        return x[:ROWS]
    exact = (x.double() - sae.b_dec) @ sae.W_enc.double().T + sae.b_enc
    top = exact.topk(case.k + 1, dim=1).values
    gap = (top[:, -2] - top[:, -1]) / exact.abs().amax(1)
    return x[gap > 1e-4][:ROWS]


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Export every case to its own folder and compute the peers' outputs in one process."""
    root = tmp_path_factory.mktemp("exports")
    config = RunConfig()
    config.model.path, config.data.path = "org/model", "org/text"
    for case in CASES:
        run_dir = root / case.name
        sae = make_sae(case)
        sae.save(run_dir)
        x = rows_without_ties(sae, case)
        assert len(x) == ROWS
        save_file({"x": x}, run_dir / "x.safetensors")
        (run_dir / HARVEST).write_text("{}")  # the config describes the harvest of this run
        export_stage.run(config, run_dir)
    done = subprocess.run(
        [str(PEERS_PYTHON), str(SCRIPT), *(str(root / case.name) for case in CASES)],
        env=peer_environment(),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return root


def relative_error(theirs: torch.Tensor, ours: torch.Tensor) -> float:
    return float((theirs - ours).abs().max() / ours.abs().max())


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_peer_computes_what_we_do(cases: Path, case: Case, peer: str) -> None:
    folder = cases / case.name
    theirs = load_file(folder / "peers.safetensors")
    sae, x = make_sae(case), load_file(folder / "x.safetensors")["x"]
    latents = sae.encode(x)
    expected = {"latents": latents, "decoded": sae.decode(latents), "recon": sae(x)}
    errors = {
        name: relative_error(theirs[f"{peer}.{name}"], ours) for name, ours in expected.items()
    }
    assert max(errors.values()) <= TOLERANCE, errors
    assert (theirs[f"{peer}.latents"] > 0).sum(1).max() <= case.k


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_peer_reads_the_settings(cases: Path, case: Case) -> None:
    facts: dict[str, Any] = json.loads((cases / case.name / "peers.json").read_text())
    assert facts["sparsify"] == {"k": case.k, "num_latents": case.L}
    assert facts["dictionary_learning"] == {"k": case.k, "dict_size": case.L}
    wanted = {
        "class": "TopKSAE",
        "k": case.k,
        "model_name": "org/model",
        "dataset_path": "org/text",
        "hook_name": "blocks.9.hook_resid_post",
        "context_size": RunConfig().data.context_tokens,
    }
    assert {key: facts["saelens"].get(key) for key in wanted} == wanted


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("case", CASES[::3], ids=lambda case: case.name)
def test_exports_are_read_back_the_same(cases: Path, case: Case, peer: str) -> None:
    folder = cases / case.name / "export" / peer
    if peer == "sparsify":
        folder = folder / "model.layers.9"
    if peer == "dictionary_learning":
        with pytest.raises(CheckpointError, match=r"is a pickle.*allow_pt=True"):
            load_sae(folder)
    again, sae = load_sae(folder, allow_pt=True), make_sae(case)
    assert isinstance(again.config, TopKConfig)
    assert (again.config.k, again.config.n_latents) == (case.k, case.L)
    for name, parameter in sae.named_parameters():
        assert torch.equal(dict(again.named_parameters())[name], parameter), name
