"""Harvest ids, chats and packed documents with real workers, and compare with the model alone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from activation_store import open_store
from analysis.evaluation import stage as evaluation_stage
from cluster.harvest import stage as harvest_stage
from cluster.language_model.errors import ModelError
from cluster.language_model.hooks import capture
from cluster.language_model.loading import load_tokenizer
from cluster.language_model.packing import require_document_masks
from cluster.language_model.tokens.contexts import prepare_contexts
from cluster.ray_session import ray_session
from conf.schema.cluster import ClusterConfig
from conf.schema.data import DataConfig
from conf.schema.model import ModelConfig
from conf.schema.run import RunConfig
from sae_core.architectures.topk.inference import TopKInference
from sae_core.config import TopKConfig
from tests.support.tiny_models import opt, save_llama

pytestmark = pytest.mark.ray
HOOKPOINT = "model.layers.1"
D = 16


@pytest.fixture(scope="module", autouse=True)
def session() -> Iterator[None]:
    with ray_session(ClusterConfig(), min_cpus=2):
        yield


def documents() -> list[list[int]]:
    generator = np.random.default_rng(0)
    return [generator.integers(3, 60, 2 + number % 20).tolist() for number in range(60)]


def run_config(tmp_path: Path, rows: list[Any], **data: Any) -> RunConfig:
    field = "messages" if data["kind"] == "chat" else "input_ids"
    file = tmp_path / "documents.jsonl"
    file.write_text("".join(json.dumps({field: row}) + "\n" for row in rows))
    data = {"tokens": 10_000, "context_tokens": 16, "heldout_fraction": 0.3, **data}
    config = RunConfig(
        cache_dir=str(tmp_path / "cache"),
        model=ModelConfig(path=str(tmp_path / "model"), hookpoints=[HOOKPOINT], dtype="float32"),
        data=DataConfig(path=str(file), **data),
    )
    config.store.path = str(tmp_path / "store")
    config.store.shard_tokens, config.store.dtype = 64, "float32"
    config.eval.tokens, config.eval.batch_contexts = 40_000, 5
    return config


def stored(config: RunConfig) -> dict[tuple[int, int], tuple[int, np.ndarray]]:
    """Return the token and the row of every document and position."""
    store = open_store(config.store.path)
    rows = store.read(HOOKPOINT, 0, store.n_tokens)
    columns = [store.read(name, 0, store.n_tokens) for name in ("document", "position", "token_id")]
    return {
        (int(document), int(position)): (int(token), row)
        for document, position, token, row in zip(*columns, rows, strict=True)
    }


@pytest.mark.parametrize("packing", ["separate", "masked"])
def test_a_document_is_read_as_if_it_were_alone(tmp_path: Path, packing: str) -> None:
    save_llama(tmp_path / "model")
    for file in (tmp_path / "model").glob("token*"):  # a model without a tokenizer
        file.unlink()
    context = 64 if packing == "masked" else 16
    config = run_config(
        tmp_path, documents(), kind="token_ids", packing=packing, context_tokens=context
    )
    harvest_stage.run(config, tmp_path / "run")
    found = stored(config)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    compared = 0
    for document, positions, ids in pieces(config, "train"):
        alone = capture(model, [HOOKPOINT], torch.tensor([[0, *ids]]))[HOOKPOINT][0, 1:]
        for position, token, expected in zip(positions, ids, alone, strict=True):
            if (document, position) in found:  # not the separators
                assert found[document, position][0] == token
                row = torch.from_numpy(found[document, position][1])
                torch.testing.assert_close(row, expected, rtol=1e-4, atol=1e-5)
                compared += 1
    assert compared == len(found) > 200

    W = torch.cat([torch.eye(D), -torch.eye(D)])
    sae_config = TopKConfig(n_latents=2 * D, k=4, hookpoint=HOOKPOINT)
    sae = TopKInference(sae_config, W, W.clone(), torch.zeros(2 * D), torch.zeros(D), step=7)
    sae.save(tmp_path / "run")
    evaluation_stage.run(config, tmp_path / "run")
    metrics = json.loads((tmp_path / "run" / "eval" / "metrics.json").read_text())
    assert metrics["heldout"], metrics
    losses = []
    for _, _, ids in pieces(config, "heldout"):
        tokens = torch.tensor([[0, *ids]])
        with torch.no_grad():
            logits = model(tokens).logits[0, 1:-1]
        losses.append(torch.nn.functional.cross_entropy(logits, tokens[0, 2:], reduction="none"))
    assert metrics["ce_clean"] == pytest.approx(float(torch.cat(losses).mean()), rel=1e-4)


def pieces(config: RunConfig, split: str) -> Iterator[tuple[int, list[int], list[int]]]:
    """Yield document, positions and token ids of each part of a document within one context."""
    tokenizer = load_tokenizer(config.model, Path(config.cache_dir), "token_ids")
    contexts = prepare_contexts(config.data, tokenizer, Path(config.cache_dir))
    part = getattr(contexts, split)
    for tokens, numbers, positions in zip(part.token_id, part.document, part.position, strict=True):
        for document in np.unique(numbers):
            own = (numbers == document) & (positions >= 0)
            if own.any():
                yield int(document), positions[own].tolist(), tokens[own].tolist()


def test_only_the_assistants_turns_are_stored(tmp_path: Path) -> None:
    save_llama(tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text(
        "{% for m in messages %} <s> {{ m['role'] }} {{ m['content'] }} </s>{% endfor %}"
    )
    chats = [
        [
            {"role": "user", "content": f"w{number % 20} w{number % 7}"},
            {"role": "assistant", "content": f"w{30 + number % 20} w{40 + number % 9}"},
        ]
        for number in range(60)
    ]
    config = run_config(tmp_path, chats, kind="chat", roles=["assistant"])
    harvest_stage.run(config, tmp_path / "run")
    tokens = {token for token, _ in stored(config).values()}
    assert tokens and min(tokens) >= 33  # w30 is 33
    provenance = open_store(config.store.path).header.provenance
    assert provenance is not None and provenance["roles"] == ["assistant"]


def test_ids_beyond_the_vocabulary_are_refused(tmp_path: Path) -> None:
    save_llama(tmp_path / "model")
    config = run_config(tmp_path, [[3, 4, 5] * 20, [3, 99] * 20], kind="token_ids")
    with pytest.raises(ModelError, match=r"token id 99 .*expected ids below 63"):
        harvest_stage.run(config, tmp_path / "run")


def test_a_model_that_mixes_documents_is_refused() -> None:
    """OPT numbers positions from its mask, and does not read those that are given."""
    with pytest.raises(ModelError, match=r"data\.packing=masked: OPTForCausalLM attends across"):
        require_document_masks(opt(), ["model.decoder.layers.1"])
