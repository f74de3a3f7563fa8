"""An SAE inside a model: its latents, edits and gradients, against the formulas."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from cluster.language_model import attach
from cluster.language_model.errors import ModelError
from cluster.language_model.hooks import capture
from sae_core.architectures.dictionary_init import random_unit_rows
from sae_core.architectures.topk.inference import TopKInference
from sae_core.config import TopKConfig
from sae_core.errors import ShapeError
from tests.support.tiny_models import save_llama

HOOKPOINT = "model.layers.1"
D, L, K = 16, 48, 4
IDS = torch.tensor([[0, 5, 9, 12, 40], [0, 7, 7, 30, 22]])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> torch.nn.Module:
    folder = tmp_path_factory.mktemp("llama")
    save_llama(folder)
    return AutoModelForCausalLM.from_pretrained(folder).requires_grad_(False)


@pytest.fixture
def sae() -> TopKInference:
    W = random_unit_rows(0, L, D, 0)
    config = TopKConfig(n_latents=L, k=K)
    return TopKInference(config, W * 1.5, W, torch.linspace(0, 0.1, L), torch.full((D,), 0.01))


@torch.no_grad()
def test_without_edits_the_model_is_the_same_to_the_bit(model, sae) -> None:
    alone = model(IDS).logits
    with attach(model, HOOKPOINT, sae) as attached:
        assert torch.equal(model(IDS).logits, alone)
    x = capture(model, [HOOKPOINT], IDS)[HOOKPOINT]
    values, indices = sae.encode_topk(x[:, 1:])
    assert torch.equal(attached.values[:, 1:], values)
    assert torch.equal(attached.indices[:, 1:], indices)
    assert not attached.values[:, 0].any() and not attached.error[:, 0].any()
    torch.testing.assert_close(attached.error[:, 1:], x[:, 1:] - sae(x[:, 1:]))
    assert torch.equal(model(IDS).logits, alone)  # nothing stays behind


@torch.no_grad()
@pytest.mark.parametrize("keep_error", [True, False])
def test_edits_move_the_activations_by_decoder_rows(model, sae, keep_error) -> None:
    x = capture(model, [HOOKPOINT], IDS)[HOOKPOINT]
    latents = sae.encode(x)
    there = int(latents[:, 1:].sum((0, 1)).argmax())
    with attach(model, HOOKPOINT, sae, keep_error=keep_error) as attached:
        attached.add(3, 2.0)
        attached.scale(there, -1.0)
        attached.ablate(5)
        attached.set(6, 0.5)
        edited = capture(model, ["model.layers.2@input"], IDS)["model.layers.2@input"]
    wanted = latents.clone()
    wanted[..., 3] += 2
    wanted[..., there] *= -1
    wanted[..., 5] = 0
    wanted[..., 6] = 0.5
    expected = sae.decode(wanted) + (x - sae(x) if keep_error else 0)
    torch.testing.assert_close(edited[:, 1:], expected[:, 1:])
    assert torch.equal(edited[:, 0], x[:, 0])
    with attach(model, HOOKPOINT, sae) as attached:
        attached.add(3, 2.0)
        attached.clear()
        assert torch.equal(model(IDS).logits, model(IDS).logits)


def test_gradients_reach_latents_and_activations(model, sae) -> None:
    embedded = model.get_input_embeddings()(IDS).requires_grad_(True)
    with attach(model, HOOKPOINT, sae) as attached:
        logits = model(inputs_embeds=embedded).logits
        logits[:, -1, 9].sum().backward()
    assert embedded.grad is not None and embedded.grad.abs().sum() > 0
    gradient = attached.values.grad
    assert gradient is not None
    b, t = 1, 3
    latent = int(attached.indices[b, t, 0])
    assert gradient[b, t, 0] != 0 and not gradient[:, 0].any()

    # The derivative is that of the logit when the latent moves at this position.
    def shifted(step: float) -> float:
        def edit(values: torch.Tensor) -> torch.Tensor:
            values = values.clone()
            values[b, t] += step
            return values

        with attach(model, HOOKPOINT, sae) as moved, torch.no_grad():
            moved.edit(latent, edit)
            return float(model(IDS).logits[:, -1, 9].sum())

    slope = (shifted(1e-3) - shifted(-1e-3)) / 2e-3
    assert float(gradient[b, t, 0]) == pytest.approx(slope, rel=0.02)


@torch.no_grad()
def test_generation_is_steered_at_every_new_token(model, sae) -> None:
    prompt = torch.tensor([[0, 5, 9]])
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 1, "eos_token_id": None}
    calls = []

    def edit(values: torch.Tensor) -> torch.Tensor:
        calls.append(attached.values.shape[1])
        return values + 3

    with attach(model, HOOKPOINT, sae) as attached:
        attached.edit(3, edit)
        made = model.generate(prompt, **options)
        applied = attached.error.abs().sum(-1) > 0
        # Without a cache, every pass has the whole text: the tokens are the same.
        again = model.generate(prompt, use_cache=False, **options)
    assert calls[:4] == [3, 1, 1, 1] and applied.all()  # also at the single token of a step
    assert torch.equal(made, again)


@torch.no_grad()
def test_padding_on_the_left_is_left_alone(model, sae) -> None:
    ids = torch.tensor([[1, 1, 0, 5, 9], [0, 7, 7, 30, 22]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    with attach(model, HOOKPOINT, sae) as attached:
        model(ids, attention_mask=mask)
    runs = attached.values.any(-1)
    assert runs.tolist() == [[False] * 3 + [True] * 2, [False] + [True] * 4]


def test_mistakes_are_named(model, sae) -> None:
    missing = attach(model, "model.layers.9", sae)
    with pytest.raises(ModelError, match=r"model\.layers\.9.*not found"), missing:
        pass
    with attach(model, "model.layers.1.mlp.up_proj", sae), pytest.raises(ShapeError, match="16"):
        model(IDS)
    with attach(model, HOOKPOINT, sae) as attached, pytest.raises(IndexError, match="48"):
        attached.ablate(48 - 1, 48)
    model(IDS)
