"""Test that models whose files, kind, positions or vocabulary do not fit are refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    BloomConfig,
    Gemma3Config,
    GPT2Model,
    RobertaConfig,
    RobertaModel,
)

from cluster.language_model.errors import ModelError
from cluster.language_model.hooks import capture
from cluster.language_model.loading import load_language_model, load_skeleton, load_tokenizer
from cluster.language_model.model_checks import (
    position_limit,
    require_known_tokens,
    require_usable_model,
)
from cluster.language_model.tokens.boundaries import boundary_ids
from cluster.language_model.tokens.contexts import prepare_contexts
from conf.schema.data import DataConfig
from conf.schema.model import ModelConfig
from foundation.errors import ConfigError
from tests.support.tiny_models import save_gpt2, save_llama, save_tokenizer, write_text

Tensors = dict[str, Tensor]
IDS = torch.tensor([[0, 5, 9, 30], [0, 7, 7, 8]])


def change_tensors(folder: Path, change: Callable[[Tensors], Tensors]) -> None:
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def change_config(folder: Path, **values: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def without(text: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: t for name, t in tensors.items() if text not in name}


def load(folder: Path, kind: str = "causal_lm", skeleton: bool = False) -> nn.Module:
    config = ModelConfig(path=str(folder), dtype="float32", kind=kind)
    return (load_skeleton if skeleton else load_language_model)(config, folder / "cache")


TENSOR_CHANGES: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "a lost part": (without("layers.1.mlp"), r"lack .*layers\.1\.mlp\.down_proj\.weight"),
    "a lost head": (without("lm_head"), r"lack .*: lm_head\.weight\. .*model\.kind=base"),
    "a compiled model": (
        lambda tensors: {f"_orig_mod.{name}": t for name, t in tensors.items()},
        "and 26 more",
    ),
    "another bias": (
        lambda tensors: {**tensors, "model.layers.0.self_attn.q_proj.bias": torch.ones(16)},
        r"does not use: model\.layers\.0\.self_attn\.q_proj\.bias\.",
    ),
}


@pytest.mark.parametrize("skeleton", [False, True])
@pytest.mark.parametrize("name", TENSOR_CHANGES)
def test_other_tensors_are_refused_by_name(name: str, skeleton: bool, tmp_path: Path) -> None:
    change, message = TENSOR_CHANGES[name]
    save_llama(tmp_path)
    change_tensors(tmp_path, change)
    with pytest.raises(ModelError, match=message):
        load(tmp_path, skeleton=skeleton)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_hidden_layers": 5}, r"lack .*model\.layers\.3\..* and 14 more"),
        ({"num_hidden_layers": 2}, r"does not use: model\.layers\.2\..* and 5 more"),
        ({"intermediate_size": 64}, r"different shapes: .*down_proj\.weight \[16, 32\] instead of"),
        ({"vocab_size": 100}, r"embed_tokens\.weight \[63, 16\] instead of \[100, 16\]"),
    ],
)
def test_another_config_is_refused(values: dict[str, object], message: str, tmp_path: Path) -> None:
    save_llama(tmp_path)
    change_config(tmp_path, **values)
    with pytest.raises(ModelError, match=message):
        load(tmp_path, skeleton=True)


def test_damaged_files_are_refused_in_one_line(tmp_path: Path) -> None:
    save_llama(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(ModelError, match=r"could not load the model.*incomplete") as caught:
        load(tmp_path, skeleton=True)
    assert "\n" not in str(caught.value)
    AutoModelForCausalLM.from_pretrained(_other(tmp_path)).save_pretrained(
        tmp_path / "shards", max_shard_size="8KB"
    )
    sorted((tmp_path / "shards").glob("*.safetensors"))[1].unlink()
    with pytest.raises(ModelError, match=r"could not load .*00002-of-"):
        load(tmp_path / "shards", skeleton=True)


def _other(folder: Path) -> Path:
    save_llama(folder / "whole")
    return folder / "whole"


def test_tied_heads_and_other_heads_are_accepted(tmp_path: Path) -> None:
    """A tied head has no separate tensor; the rows are the same in every process."""
    save_llama(tmp_path)
    change_tensors(tmp_path, without("lm_head"))
    change_tensors(tmp_path, lambda tensors: {**tensors, "score.weight": torch.ones(2, 16)})
    change_config(tmp_path, tie_word_embeddings=True)
    first, second = load(tmp_path), load(tmp_path)
    assert torch.equal(first(IDS).logits, second(IDS).logits)
    assert first.get_submodule("lm_head").weight is first.get_submodule("model.embed_tokens").weight
    # A GPT-2 saved without its head has the same weights as with it.
    whole = save_gpt2(tmp_path / "gpt2")
    GPT2Model.from_pretrained(tmp_path / "gpt2").save_pretrained(tmp_path / "gpt2")
    assert torch.equal(load(tmp_path / "gpt2")(IDS).logits, whole(IDS).logits)


def save_bert(folder: Path, kind: type = BertModel) -> nn.Module:
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
    model = kind(BertConfig(vocab_size=63, num_hidden_layers=2, **sizes)).eval()
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return model


@pytest.mark.parametrize("kind", [BertModel, BertForMaskedLM])
def test_an_encoder_is_harvested_only_as_a_base_model(kind: type, tmp_path: Path) -> None:
    bert = save_bert(tmp_path, kind)
    with pytest.raises(ModelError, match=r"bert models are bidirectional.*model\.kind=base"):
        load(tmp_path)
    model = load(tmp_path, "base")
    rows = capture(model, ["encoder.layer.1"], IDS)["encoder.layer.1"]
    body: Any = bert.bert if kind is BertForMaskedLM else bert
    assert torch.equal(rows, body(IDS).last_hidden_state)


def test_an_untrained_pooler_is_no_hookpoint(tmp_path: Path) -> None:
    save_bert(tmp_path, BertForMaskedLM)
    config = ModelConfig(path=str(tmp_path), kind="base", hookpoints=["pooler.dense"])
    with pytest.raises(ModelError, match=r"lack .*pooler\.dense\.bias"):
        load_skeleton(config, tmp_path / "cache")


def test_an_encoders_tokenizer_begins_contexts_with_its_own_tokens(tmp_path: Path) -> None:
    tokenizer = save_tokenizer(tmp_path)
    tokenizer.bos_token = tokenizer.eos_token = None
    tokenizer.cls_token, tokenizer.sep_token = "w1", "w2"
    assert boundary_ids(tokenizer, DataConfig()) == (4, 5)


def test_models_that_predict_nothing_name_the_way_out(tmp_path: Path) -> None:
    from transformers import T5Config, T5EncoderModel

    config = T5Config(vocab_size=63, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    T5EncoderModel(config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"no t5 model that predicts .*model\.kind=base"):
        load(tmp_path, skeleton=True)


def usable(folder: Path, context_tokens: int, hookpoint: str = "model.layers.1") -> nn.Module:
    config = ModelConfig(path=str(folder), hookpoints=[hookpoint], dtype="float32")
    return require_usable_model(config, context_tokens, folder / "cache")


def test_contexts_beyond_the_models_positions_are_refused(tmp_path: Path) -> None:
    save_gpt2(tmp_path / "learned")
    usable(tmp_path / "learned", 64, "transformer.h.0")
    with pytest.raises(ConfigError, match=r"data\.context_tokens=65.*at most 64"):
        usable(tmp_path / "learned", 65, "transformer.h.0")
    save_llama(tmp_path / "rotary")
    change_config(tmp_path / "rotary", max_position_embeddings=128)
    with pytest.raises(ConfigError, match=r"data\.context_tokens=129.*at most 128"):
        usable(tmp_path / "rotary", 129)
    # YaRN: `max_position_embeddings` of Qwen2.5 is the original number of positions.
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
    change_config(tmp_path / "rotary", rope_parameters={**rope, "rope_theta": 10000.0})
    assert position_limit(usable(tmp_path / "rotary", 512)) == 512


def test_position_limits_of_other_architectures(tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
    roberta = RobertaConfig(
        vocab_size=63, num_hidden_layers=1, max_position_embeddings=34, pad_token_id=1, **sizes
    )
    assert position_limit(RobertaModel(roberta)) == 32
    RobertaModel(roberta)(torch.full((1, 32), 5))  # 33 tokens raise an IndexError
    bloom = AutoModelForCausalLM.from_config(
        BloomConfig(vocab_size=63, hidden_size=16, n_layer=1, n_head=2)
    )
    assert position_limit(bloom) is None


def test_a_missing_module_is_named_before_the_weights_are_read(tmp_path: Path) -> None:
    save_llama(tmp_path)
    with pytest.raises(ModelError, match=r"module 'model\.layers\.7' not found.*model\.layers\.2"):
        usable(tmp_path, 16, "model.layers.7")


def test_tokens_without_an_embedding_are_refused(tmp_path: Path) -> None:
    save_llama(tmp_path)
    change_tensors(
        tmp_path,
        lambda tensors: {
            name: t[:40].clone() if name in ("lm_head.weight", "model.embed_tokens.weight") else t
            for name, t in tensors.items()
        },
    )
    change_config(tmp_path, vocab_size=40)
    skeleton = usable(tmp_path, 16)
    tokenizer = load_tokenizer(ModelConfig(path=str(tmp_path)), tmp_path / "cache")
    data = DataConfig(path=str(write_text(tmp_path / "text.txt")), context_tokens=16)
    contexts = prepare_contexts(data, tokenizer, tmp_path / "cache")
    with pytest.raises(ModelError, match=r"token id 62 \('w59'\); expected ids below 40"):
        require_known_tokens(skeleton, tokenizer, contexts)
    few = tmp_path / "few.txt"
    few.write_text("\n\n".join(f"w1 w2 w3 w4 w{i}" for i in range(30)))
    data.path = str(few)
    require_known_tokens(skeleton, tokenizer, prepare_contexts(data, tokenizer, tmp_path / "cache"))


def test_a_multimodal_model_is_loaded_with_its_language_model_head(tmp_path: Path) -> None:
    text = {
        "vocab_size": 63,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
    }
    vision = {
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    whole = AutoModelForCausalLM.from_config(config).eval()
    whole.save_pretrained(tmp_path)
    model = load(tmp_path)
    assert torch.equal(model(input_ids=IDS).logits, whole(input_ids=IDS).logits)
    hookpoint = "model.language_model.layers.1"
    assert capture(model, [hookpoint], IDS)[hookpoint].shape == (2, 4, 16)
    assert position_limit(model) == 131072


@pytest.mark.parametrize(
    "values",
    [
        {"hidden_size": "wide"},
        {"hidden_size": None},
        {"num_attention_heads": 0},
        {"num_attention_heads": 3},
        {"num_hidden_layers": -1},
        {"hidden_act": "unheard of"},
        {"rope_parameters": [1]},
        {"quantization_config": "fp8"},
        {"quantization_config": {"quant_method": "fp8", "weight_block_size": 5}},
    ],
    ids=str,
)
def test_a_configuration_with_wrong_values_is_refused(
    tmp_path: Path, values: dict[str, object]
) -> None:
    """Transformers raises whatever such values make it run into, such as ZeroDivisionError."""
    save_llama(tmp_path)
    change_config(tmp_path, **values)
    for skeleton in (False, True):
        with pytest.raises(ModelError, match=r"^model\.path: "):
            load(tmp_path, skeleton=skeleton)


@pytest.mark.parametrize("text", ["{", "{}", "[]", ""])
def test_a_damaged_tokenizer_is_refused(tmp_path: Path, text: str) -> None:
    save_llama(tmp_path)
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(ModelError, match=r"^model\.path: could not load a tokenizer"):
        load_tokenizer(ModelConfig(path=str(tmp_path)), tmp_path / "cache")
