"""Compare the evaluation with a reference in float64 that shares no code with it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM

from activation_store import open_store
from analysis.evaluation import stage as evaluation_stage
from analysis.evaluation.measurement import Rows
from analysis.evaluation.reconstruction import ReconstructionSums
from cluster.language_model.errors import TextError
from cluster.language_model.loading import load_tokenizer
from cluster.language_model.tokens.contexts import prepare_contexts
from conf.schema.data import DataConfig
from conf.schema.model import ModelConfig
from conf.schema.run import RunConfig
from sae_core.architectures.topk.inference import TopKInference
from sae_core.config import TopKConfig
from tests.support.tiny_models import harvest_here, save_llama, write_text

D, L, K, HOOKPOINT = 16, 48, 4, "model.layers.1"
Matrix = NDArray[np.float64]


def sae_of(centre: Matrix, size: float) -> TopKInference:
    """Return an SAE with random decoder rows around a centre; its biases have the given size."""
    generator = torch.Generator().manual_seed(3)
    W = torch.nn.functional.normalize(torch.randn(L, D, generator=generator), dim=1)
    b_enc = 0.1 * size * torch.randn(L, generator=generator)
    config = TopKConfig(n_latents=L, k=K, hookpoint=HOOKPOINT)
    return TopKInference(config, W, W.clone(), b_enc, torch.from_numpy(centre).float(), step=7)


def reconstruct(sae: TopKInference, x: Matrix) -> Matrix:
    """Return the reconstructions of rows [n, D], one row after the other."""
    W_enc, W_dec, b_enc, b_dec = (
        getattr(sae, name).detach().double().numpy()
        for name in ("W_enc", "W_dec", "b_enc", "b_dec")
    )
    rows = []
    for row in x:
        pre_acts = W_enc @ (row - b_dec) + b_enc
        active = np.argsort(-pre_acts, kind="stable")[:K]
        rows.append(b_dec + np.maximum(pre_acts[active], 0) @ W_dec[active])
    return np.stack(rows)


def rows_of(kind: str) -> Matrix:
    generator = np.random.default_rng(5)
    x = generator.normal(size=({"two rows": 2, "three rows": 3}.get(kind, 300), D))
    if kind == "large mean":
        x += 10_000
    if kind == "loud channel":
        x[:, 3] = 1000 * x[:, 3] + 50
    if kind == "loud row":
        x[7] *= 1e5
    return x.astype(np.float32).astype(np.float64)


KINDS = ["plain", "large mean", "loud channel", "loud row", "two rows", "three rows"]


@pytest.mark.parametrize("kind", KINDS)
def test_fvu_equals_the_reference_on_awkward_rows(kind: str) -> None:
    x = rows_of(kind)
    typical = np.median(x, axis=0)
    sae = sae_of(x.mean(0), float(x.std(0).mean()))
    recon = reconstruct(sae, x)
    errors = ((x - recon) ** 2).sum(1)
    around = ((x - typical) ** 2).sum(1)

    sums = ReconstructionSums(sae)
    sums.start(torch.from_numpy(typical))
    for part in np.array_split(x, min(7, len(x))):
        rows = torch.from_numpy(part).float()
        values, indices = sae.encode_topk(rows)
        sums.add_rows(Rows(rows, sae.decode_topk(values, indices), values, indices))
    # At a mean of 10,000, float32 reconstructions are off by up to 5e-4.
    rel = 1e-4 if kind == "large mean" else 1e-5
    assert sums.fvu == pytest.approx(errors.sum() / ((x - x.mean(0)) ** 2).sum(), rel=rel)
    assert sums.mse == pytest.approx(errors.mean() / D, rel=rel)
    ratios = errors[around > 0] / around[around > 0]
    assert sums.fvu_median == pytest.approx(np.median(ratios), rel=rel)


def test_one_row_has_no_variance_and_no_row_has_no_error() -> None:
    sae = sae_of(np.zeros(D), 1.0)
    sums = ReconstructionSums(sae)
    assert (sums.fvu, sums.fvu_median, sums.mse, sums.l0, sums.top_share) == (None,) * 5
    x = torch.ones(1, D)
    sums.start(x[0])
    sums.add_rows(Rows(x, 2 * x, torch.ones(1, K), torch.zeros(1, K, dtype=torch.int64)))
    assert (sums.fvu, sums.fvu_median, sums.mse, sums.l0) == (None, None, 1.0, K)


def run_config(tmp_path: Path, **data: Any) -> RunConfig:
    """Return the config of a model whose rows have a large mean and one loud channel."""
    model = save_llama(tmp_path / "model")
    weight = model.get_input_embeddings().weight.data
    weight.mul_(20).add_(1)
    weight[:, 3] *= 5
    model.lm_head.weight.data *= 40  # so that the cross-entropy depends on the hookpoint
    model.save_pretrained(tmp_path / "model")
    config = RunConfig(cache_dir=str(tmp_path / "cache"))
    config.model = ModelConfig(
        path=str(tmp_path / "model"), hookpoints=[HOOKPOINT], dtype="float32"
    )
    settings = {"tokens": 300, "context_tokens": 16, "heldout_fraction": 0.2, **data}
    config.data = DataConfig(path=str(write_text(tmp_path / "text.txt")), **settings)
    config.store.path, config.store.shard_tokens = str(tmp_path / "store"), 64
    config.store.dtype, config.eval.tokens = "float32", 320
    return config


def evaluated(config: RunConfig, sae: TopKInference, run_dir: Path) -> dict[str, Any]:
    sae.save(run_dir)
    evaluation_stage.run(config, run_dir)
    return dict(json.loads((run_dir / "eval" / "metrics.json").read_text()))


def test_cross_entropies_equal_the_reference(tmp_path: Path) -> None:
    config = run_config(tmp_path)
    run_dir = tmp_path / "run"
    harvest_here(config, run_dir)
    store = open_store(config.store.path)
    stored = store.read(HOOKPOINT, 0, store.n_tokens).astype(np.float64)
    sae = sae_of(stored.mean(0), float(stored.std(0).mean()))
    metrics = evaluated(config, sae, run_dir)

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model").double()
    cache = tmp_path / "cache"
    heldout = prepare_contexts(config.data, load_tokenizer(config.model, cache), cache).heldout
    order = np.random.default_rng([config.seed, 2]).permutation(len(heldout))[:20]
    losses: dict[str, list[float]] = {name: [] for name in ("clean", "recon", "zero", "mean")}
    divergences: list[float] = []
    replacements: dict[str, Callable[[Matrix], Matrix]] = {
        "clean": lambda x: x,
        "recon": lambda x: reconstruct(sae, x),
        "zero": np.zeros_like,
        "mean": lambda x: np.broadcast_to(stored.mean(0), x.shape),
    }
    for ids in heldout.input_ids(order):
        kept = [t for t, token in enumerate(ids) if t > 0 and token not in (0, 1)]
        clean: Matrix | None = None
        for name, replace in replacements.items():
            log_p = log_probabilities(model, ids, kept, replace)
            losses[name] += [-log_p[t, ids[t + 1]] for t in range(1, len(ids) - 1)]
            clean = log_p if clean is None else clean
            if name == "recon":
                each = (np.exp(clean) * (clean - log_p)).sum(1)
                divergences += each[1 : len(ids) - 1].tolist()
    ce = {name: float(np.mean(values)) for name, values in losses.items()}
    for name, value in ce.items():
        assert metrics[f"ce_{name}"] == pytest.approx(value, rel=1e-5)
    assert abs(ce["mean"] - ce["clean"]) > 0.02 and abs(ce["recon"] - ce["clean"]) > 0.01
    for metric, ablated in (("ce_recovered", "zero"), ("ce_recovered_mean", "mean")):
        expected = (ce[ablated] - ce["recon"]) / (ce[ablated] - ce["clean"])
        assert metrics[metric] == pytest.approx(expected, rel=1e-3)
    assert metrics["kl"] == pytest.approx(float(np.mean(divergences)), rel=1e-4)


@torch.inference_mode()
def log_probabilities(
    model: Any, ids: NDArray[np.int64], kept: list[int], replace: Callable[[Matrix], Matrix]
) -> Matrix:
    """Return log-probabilities [T, vocabulary] with the rows at `kept` replaced."""

    def hook(_module: Any, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        changed = output.clone()
        changed[0, kept] = torch.from_numpy(np.array(replace(output[0, kept].numpy())))
        return changed

    handle = model.get_submodule(HOOKPOINT).register_forward_hook(hook)
    logits = model(torch.from_numpy(ids)[None]).logits[0].numpy()
    handle.remove()
    shifted = logits - logits.max(1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(1, keepdims=True)))


def test_contexts_without_a_prediction_have_no_cross_entropy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A context of BOS and one token predicts nothing after a replaced row."""
    config = run_config(tmp_path, context_tokens=2)
    run_dir = tmp_path / "run"
    harvest_here(config, run_dir)
    metrics = evaluated(config, sae_of(np.zeros(D), 1.0), run_dir)
    assert metrics["heldout"] and metrics["fvu"] is not None
    assert metrics["reason"].startswith("no cross-entropy, as no held-out token")
    names = ("ce_clean", "ce_recon", "ce_zero", "ce_mean", "ce_recovered", "kl")
    assert [metrics[name] for name in names] == [None] * len(names)
    assert "no cross-entropy, as no held-out token" in capsys.readouterr().out


def test_a_change_of_almost_nothing_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = run_config(tmp_path)
    model = save_llama(tmp_path / "model")
    model.lm_head.weight.data *= 1e-3
    model.save_pretrained(tmp_path / "model")
    harvest_here(config, tmp_path / "run")
    evaluated(config, sae_of(np.zeros(D), 1.0), tmp_path / "run")
    out = " ".join(capsys.readouterr().out.split())
    assert "nats, so ce_recovered_mean and ce_recovered tell little" in out


def test_held_out_text_without_rows_is_refused(tmp_path: Path) -> None:
    config = run_config(tmp_path)
    harvest_here(config, tmp_path / "run")
    config.eval.tokens = 16
    sae_of(np.zeros(D), 1.0).save(tmp_path / "run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation_stage, "_max_norm", lambda evaluation: 0.0)
        with pytest.raises(TextError, match="keeps none of the rows of the 1 held-out contexts"):
            evaluation_stage.run(config, tmp_path / "run")
