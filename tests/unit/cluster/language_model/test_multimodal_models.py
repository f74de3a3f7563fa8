"""Test that the text part of models that also read images is harvested like any language model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from activation_store import open_store
from cluster.language_model.hooks import require_one_row_per_token
from cluster.language_model.loading import load_language_model, load_skeleton, load_tokenizer
from cluster.language_model.model_checks import (
    head_counts,
    hookpoint_width,
    model_without_weights,
    position_limit,
)
from cluster.language_model.sizes import n_embeddings
from cluster.language_model.stage import list_hookpoints
from cluster.language_model.tokens.contexts import Split, prepare_contexts
from conf.schema.data import DataConfig
from conf.schema.model import ModelConfig
from conf.schema.run import RunConfig
from tests.support.tiny_models import VOCABULARY, harvest_here, save_tokenizer, write_text

D, POSITIONS = 16, 48
# The vision parts are wider than the text, so that their sizes cannot be taken for its own.
VISION: dict[str, Any] = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 1,
    "num_attention_heads": 3,
    "image_size": 8,
    "patch_size": 4,
}
QWEN_VISION: dict[str, Any] = {
    "depth": 1,
    "hidden_size": D,
    "num_heads": 2,
    "patch_size": 4,
    "intermediate_size": 40,
}
QWEN_IDS = {f"{name}_token_id": 5 for name in ("image", "video", "vision_start", "vision_end")}


def text(**more: Any) -> dict[str, Any]:
    return {
        "vocab_size": len(VOCABULARY),
        "hidden_size": D,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "max_position_embeddings": POSITIONS,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
        **more,
    }


def qwen_text() -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
    return text(rope_parameters=rope)


CONFIGS: dict[str, Callable[[], Any]] = {
    "Gemma3": lambda: transformers.Gemma3Config(
        text_config=text(sliding_window=8),
        vision_config=VISION,
        mm_tokens_per_image=4,
        image_token_index=5,
    ),
    "Mistral3": lambda: transformers.Mistral3Config(
        text_config=text(model_type="mistral"),
        vision_config={**VISION, "model_type": "pixtral", "head_dim": 8},
        image_token_index=5,
    ),
    "Llama4": lambda: transformers.Llama4Config(
        text_config=text(intermediate_size_mlp=32, num_local_experts=2, num_experts_per_tok=1),
        vision_config={
            **VISION,
            "vision_output_dim": 24,
            "projector_input_dim": 24,
            "projector_output_dim": 24,
        },
    ),
    "Qwen2VL": lambda: transformers.Qwen2VLConfig(
        text_config=qwen_text(),
        vision_config={**QWEN_VISION, "embed_dim": 24, "mlp_ratio": 2, "num_heads": 3},
        **QWEN_IDS,
    ),
    "Qwen2_5_VL": lambda: transformers.Qwen2_5_VLConfig(
        text_config=qwen_text(),
        vision_config={**QWEN_VISION, "out_hidden_size": D, "fullatt_block_indexes": [0]},
        **QWEN_IDS,
    ),
    "Qwen3VL": lambda: transformers.Qwen3VLConfig(
        text_config=qwen_text(),
        vision_config={
            **QWEN_VISION,
            "out_hidden_size": D,
            "deepstack_visual_indexes": [0],
            "num_position_embeddings": 16,
        },
        **QWEN_IDS,
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_text_part_is_harvested(tmp_path: Path, name: str) -> None:
    folder, cache = tmp_path / "model", tmp_path / "cache"
    torch.manual_seed(0)
    whole = transformers.AutoModelForImageTextToText.from_config(CONFIGS[name]()).eval()
    whole.save_pretrained(folder)
    save_tokenizer(folder)
    # Llama 4 has a class for its text part alone, whose modules have other names.
    part = "model" if name == "Llama4" else "model.language_model"
    own_layer = "language_model.model.layers.1" if name == "Llama4" else f"{part}.layers.1"
    hookpoint, head = f"{part}.layers.1", f"{part}.layers.1.self_attn.o_proj@input[head=1]"
    model = ModelConfig(path=str(folder), dtype="float32", hookpoints=[hookpoint, head])

    skeleton = load_skeleton(model, cache)
    assert position_limit(skeleton) == POSITIONS
    assert n_embeddings(skeleton) == len(VOCABULARY)
    assert head_counts(skeleton) == [("2 heads (1 of keys and values)", 8)]
    assert [hookpoint_width(model, one, cache) for one in model.hookpoints] == [D, 8]
    modules, failure = list_hookpoints(model_without_weights(model, cache))
    listed = {row.module: row for row in modules}
    assert failure == ""
    layer = listed[f"{part}.layers.N"]
    assert (layer.layers, layer.output, layer.input) == ([0, 1], str(D), str(D))
    assert listed[f"{part}.layers.N.self_attn.k_proj"].output == "8"
    require_one_row_per_token(load_language_model(model, cache), model.hookpoints)

    config = RunConfig(cache_dir=str(cache), model=model)
    config.data = DataConfig(
        path=str(write_text(tmp_path / "text.txt")),
        tokens=200,
        context_tokens=16,
        heldout_fraction=0.2,
    )
    config.store.path, config.store.shard_tokens = str(tmp_path / "store"), 64
    config.store.dtype = "float32"
    harvest_here(config, tmp_path / "run")
    store = open_store(config.store.path)
    assert store.arrays == {hookpoint: D, head: 8}
    contexts = prepare_contexts(config.data, load_tokenizer(model, cache), cache)
    ids = torch.from_numpy(contexts.train.input_ids(np.arange(len(contexts.train))))
    seen: list[torch.Tensor] = []
    whole.get_submodule(own_layer).register_forward_hook(
        lambda _m, _i, output: seen.append(output[0] if isinstance(output, tuple) else output)
    )
    with torch.inference_mode():
        whole(input_ids=ids)
    own = dict(zip(places(contexts.train), seen[0][:, 1:].flatten(0, 1), strict=True))
    columns = [store.read(column, 0, store.n_tokens) for column in ("document", "position")]
    wanted = torch.stack([own[int(d), int(p)] for d, p in zip(*columns, strict=True)])
    rows = torch.from_numpy(store.read(hookpoint, 0, store.n_tokens))
    assert len(rows) >= 200
    torch.testing.assert_close(rows, wanted, rtol=1e-4, atol=1e-5)


def places(split: Split) -> list[tuple[int, int]]:
    """Return the document and the position of every token."""
    pairs = zip(split.document.ravel(), split.position.ravel(), strict=True)
    return [(int(document), int(position)) for document, position in pairs]
