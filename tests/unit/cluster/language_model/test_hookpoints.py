"""Test how hookpoints are written, and that the kind decides what is captured and replaced."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from cluster.language_model.errors import ModelError
from cluster.language_model.hookpoint_kinds import require_usable, resolve
from cluster.language_model.hooks import capture, splice
from cluster.language_model.model_checks import hookpoint_width
from conf.hookpoint import Hookpoint, parse_hookpoint
from conf.schema.model import ModelConfig
from foundation.errors import ConfigError
from tests.support.tiny_models import save_gpt2, save_llama

IDS = torch.tensor([[0, 5, 9, 30], [0, 7, 7, 8]])


@pytest.mark.parametrize(
    ("text", "expected", "shortest"),
    [
        ("model.layers.9", Hookpoint("model.layers.9"), "model.layers.9"),
        ("model.layers.9@output", Hookpoint("model.layers.9"), "model.layers.9"),
        ("h.0.attn-x@input", Hookpoint("h.0.attn-x", "input"), "h.0.attn-x@input"),
        (
            "o_proj@input[tokens=-1,head=3]",
            Hookpoint("o_proj", "input", (("head", "3"), ("tokens", "-1"))),
            "o_proj@input[head=3,tokens=-1]",
        ),
    ],
)
def test_a_hookpoint_is_a_module_a_kind_and_options(
    text: str, expected: Hookpoint, shortest: str
) -> None:
    assert parse_hookpoint(text) == expected
    assert str(expected) == shortest
    assert parse_hookpoint(shortest) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "@input",
        "h.0@",
        "h.0@input[]",
        "h.0@input[head]",
        "h.0@input[head=3,]",
        "h.0@input[head=3,head=4]",
        "h.0@input[head=3]x",
        "h.0[head=3]",
        "h.0@a@b",
        "h.0@input[head=[3]]",
        "h 0",
        "../h.0",
        "h.0\n",
    ],
)
def test_malformed_hookpoints_are_named(text: str) -> None:
    cfg = ModelConfig(path="m", hookpoints=["h.1", text])
    with pytest.raises(ConfigError, match=r"expected module, module@kind or module@kind\[op") as at:
        cfg.validate()
    assert f"model.hookpoints={text!r}" in str(at.value)


def test_the_same_tensor_is_listed_once() -> None:
    ModelConfig(path="m", hookpoints=["h.1", "h.1@input"]).validate()
    with pytest.raises(ConfigError, match="each hookpoint only once"):
        ModelConfig(path="m", hookpoints=["h.1", "h.1@output"]).validate()


def test_unknown_kinds_and_options_are_refused_before_any_work() -> None:
    with pytest.raises(ConfigError, match=r"'h.0@nothing'.* one of these kinds after '@': output"):
        require_usable(ModelConfig(hookpoints=["h.1", "h.0@nothing"]))
    with pytest.raises(ConfigError, match=r"'h.0@output\[side=3\]': expected no options other"):
        require_usable(ModelConfig(hookpoints=["h.0@output[side=3]"]))
    cfg = ModelConfig(hookpoints=["h.0", "h.0@input"], shards=2)
    with pytest.raises(ConfigError, match=r"model.shards=2: .*'input' \(h.0@input\) need a whol"):
        require_usable(cfg)
    cfg.shards = 1
    require_usable(cfg)
    assert resolve("h.0@input")[0] == Hookpoint("h.0", "input")


def test_the_kind_gives_the_width(tmp_path: Path) -> None:
    save_gpt2(tmp_path / "model")
    cfg = ModelConfig(path=str(tmp_path / "model"))
    assert hookpoint_width(cfg, "transformer.h.0@input", tmp_path) == 12
    assert hookpoint_width(cfg, "transformer.h.0.attn.c_proj@input[head=1]", tmp_path) == 6


def test_another_kind_is_captured_and_replaced(tmp_path: Path) -> None:
    model = save_llama(tmp_path / "model")
    inside = "model.layers.1.mlp"
    seen: list[torch.Tensor] = []
    module = model.get_submodule(inside)
    with torch.inference_mode():
        handle = module.register_forward_pre_hook(lambda _m, inputs: seen.append(inputs[0]))
        clean = model(IDS).logits
        handle.remove()
        keep_first = torch.tensor([1.0, 0, 0, 0])[:, None]  # position 0 is never replaced
        handle = module.register_forward_pre_hook(lambda _m, inputs: (inputs[0] * keep_first,))
        zeroed = model(IDS).logits
        handle.remove()
        found = capture(model, [inside, f"{inside}@input", f"{inside}@output"], IDS)
        with splice(model, f"{inside}@input", torch.zeros_like):
            spliced = model(IDS).logits
        with pytest.raises(ModelError, match=r"the input of 'model' is .*expected a tensor"):
            capture(model, ["model@input"], IDS)
        assert torch.equal(model(IDS).logits, clean)
    assert torch.equal(found[f"{inside}@input"], seen[0])
    assert torch.equal(found[inside], found[f"{inside}@output"])
    assert not torch.equal(found[inside], seen[0])
    assert torch.equal(spliced, zeroed)
    assert not torch.allclose(spliced[:, 1:], clean[:, 1:])


def test_options_choose_a_part_of_the_tensor(tmp_path: Path) -> None:
    model = save_gpt2(tmp_path / "model")
    whole = "transformer.h.0.attn.c_proj@input"
    heads = [f"{whole}[head={head}]" for head in (0, 1)]
    with torch.inference_mode():
        found = capture(model, [whole, *heads], IDS)
        with splice(model, heads[1], torch.zeros_like):
            ablated = capture(model, [whole], IDS)[whole]
        with pytest.raises(ConfigError, match=r"\[side=3\]': expected no options other than head"):
            capture(model, [f"{whole}[side=3]"], IDS)
    assert torch.equal(torch.cat([found[head] for head in heads], -1), found[whole])
    assert found[heads[1]].any() and not ablated[:, 1:, 6:].any()
    assert torch.equal(ablated[:, :, :6], found[whole][:, :, :6])


def test_widths_are_measured_on_the_model_without_weights(tmp_path: Path) -> None:
    model = save_llama(tmp_path / "model")
    cfg = ModelConfig(path=str(tmp_path / "model"))
    inner = model.config.intermediate_size
    assert inner != model.config.hidden_size
    assert hookpoint_width(cfg, "model.layers.0.mlp.down_proj@input", tmp_path) == inner
    assert hookpoint_width(cfg, "model.layers.0.mlp.gate_proj", tmp_path) == inner
    with pytest.raises(ModelError, match=r"module 'model.layers.77' not found"):
        hookpoint_width(cfg, "model.layers.77", tmp_path)


def test_heads_of_grouped_query_attention(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=64, intermediate_size=24, num_hidden_layers=1, **sizes)
    ).eval()
    attention = "model.layers.0.self_attn"
    size = model.config.hidden_size // model.config.num_attention_heads
    n_values = model.config.num_key_value_heads
    assert n_values < model.config.num_attention_heads
    names = [f"{attention}.v_proj", f"{attention}.v_proj[head=1]".replace("[", "@output[")]
    found = capture(model, names, IDS)
    assert torch.equal(found[names[1]], found[names[0]][..., size : 2 * size])
    with pytest.raises(ModelError, match=rf"head={n_values} of .*: expected 0 to {n_values - 1}"):
        capture(model, [f"{attention}.v_proj@output[head={n_values}]"], IDS)
    with pytest.raises(ModelError, match=r"has width \d+: expected .* heads of width"):
        capture(model, ["model.layers.0.mlp.gate_proj@output[head=0]"], IDS)


def test_elements_of_containers_are_chosen_by_name(tmp_path: Path) -> None:
    model = save_gpt2(tmp_path / "model")
    with torch.inference_mode():
        clean = model(IDS).logits
        final = "transformer.ln_f"
        found = capture(model, ["transformer", final], IDS)
        # `transformer` returns a dataclass, which is a dictionary; its hidden states are those of
        # the final layer norm.
        assert torch.equal(found["transformer"], found[final])
        with splice(model, "transformer@output[item=last_hidden_state]", torch.zeros_like):
            zeroed = model(IDS).logits
        assert torch.equal(zeroed[:, 0], clean[:, 0]) and not zeroed[:, 1:].any()
        with pytest.raises(ModelError, match=r"item 'nothing' not found .*: last_hidden_state \["):
            capture(model, ["transformer@output[item=nothing]"], IDS)
        with splice(model, "transformer", lambda hidden: hidden):
            assert torch.equal(model(IDS).logits, clean)


def test_inputs_given_by_keyword(tmp_path: Path) -> None:
    model = save_llama(tmp_path / "model")
    attention, norm = "model.layers.1.self_attn", "model.layers.1.input_layernorm"
    found = capture(model, [f"{attention}@input", norm], IDS)
    assert torch.equal(found[f"{attention}@input"], found[norm])
    with torch.inference_mode(), splice(model, f"{attention}@input", torch.zeros_like):
        spliced = model(IDS).logits
    with torch.inference_mode(), splice(model, norm, torch.zeros_like):
        expected = model(IDS).logits
    assert torch.equal(spliced, expected)
