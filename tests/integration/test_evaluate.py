"""Test the evaluation on hand-made dictionaries with known metrics and a tiny model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from activation_store import StoreWriter, open_store
from activation_store.config import MixedStore
from activation_store.errors import StoreMismatchError
from analysis.evaluation import firing
from analysis.evaluation import stage as evaluation_stage
from analysis.evaluation.measurement import Accumulator, Measured, Predictions, Rows
from analysis.evaluation.metrics import METRICS, Metric
from analysis.pages import stage as report_stage
from cluster.harvest import stage as harvest_stage
from cluster.language_model.loading import load_language_model, load_tokenizer
from cluster.language_model.tokens.contexts import prepare_contexts
from cluster.ray_session import ray_session
from conf.schema.cluster import ClusterConfig
from conf.schema.data import DataConfig
from conf.schema.model import ModelConfig
from conf.schema.run import RunConfig
from foundation.errors import ConfigError
from sae_core import SAE
from sae_core.architectures.topk.inference import TopKInference
from sae_core.config import TopKConfig
from tests.support.tiny_models import save_llama, write_text

pytestmark = pytest.mark.ray
D, HOOKPOINT = 16, "model.layers.1"


@pytest.fixture(scope="module")
def harvested(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunConfig]:
    """Harvest a tiny random Llama in float32, so that equal activations give equal losses."""
    folder = tmp_path_factory.mktemp("harvest")
    save_llama(folder / "model")
    config = RunConfig(
        cache_dir=str(folder / "cache"),
        model=ModelConfig(
            path=str(folder / "model"), hookpoints=["model.layers.0", HOOKPOINT], dtype="float32"
        ),
        data=DataConfig(
            path=str(write_text(folder / "text.txt")),
            tokens=700,
            context_tokens=16,
            heldout_fraction=0.2,
        ),
    )
    config.store.path, config.store.shard_tokens = str(folder / "store"), 64
    config.store.dtype = "float32"
    config.eval.tokens, config.eval.batch_contexts = 200, 5
    with ray_session(ClusterConfig(), min_cpus=2):
        harvest_stage.run(config, folder / "run")
    yield config


def save_sae(folder: Path, W: torch.Tensor, k: int, **biases: torch.Tensor) -> SAE:
    """Save an SAE with W_enc = W_dec = W [L, D] as the run's result, and return it."""
    zeros = {"b_enc": torch.zeros(len(W)), "b_dec": torch.zeros(W.shape[1])}
    config = TopKConfig(n_latents=len(W), k=k, hookpoint=HOOKPOINT)
    both = {**zeros, **biases}
    sae = TopKInference(config, W, W.clone(), both["b_enc"], both["b_dec"], step=7)
    sae.save(folder)
    return sae


def metrics_of(config: RunConfig, run_dir: Path) -> dict[str, Any]:
    evaluation_stage.run(config, run_dir)
    return dict(json.loads((run_dir / "eval" / "metrics.json").read_text()))


def plus_minus(scale: float = 1.0) -> torch.Tensor:
    """Return rows e_i and -e_i [2D, D], which reconstruct every activation exactly if k = D."""
    return torch.cat([torch.eye(D), -torch.eye(D)]) * scale


def test_a_perfect_dictionary_loses_nothing(harvested: RunConfig, tmp_path: Path) -> None:
    save_sae(tmp_path, plus_minus(), k=D)
    metrics = metrics_of(harvested, tmp_path)
    assert metrics["heldout"] and metrics["reason"] is None
    assert metrics["fvu"] < 1e-10 and metrics["mse"] < 1e-10
    assert metrics["l0"] == pytest.approx(D) and metrics["dead_fraction"] == 0
    assert metrics["ce_recon"] == pytest.approx(metrics["ce_clean"], abs=1e-6)
    assert metrics["kl"] == pytest.approx(0, abs=1e-6)
    assert metrics["ce_recovered"] == pytest.approx(1, abs=1e-3)
    assert metrics["tokens"] == 192 and metrics["hookpoint"] == HOOKPOINT  # 12 contexts of 16


def test_an_sae_from_elsewhere_is_measured(harvested: RunConfig, tmp_path: Path) -> None:
    own = save_sae(tmp_path / "own", plus_minus(), k=4)
    expected = metrics_of(harvested, tmp_path / "own")
    # A folder of sparsify, which calls its hookpoint by the name of the folder.
    folder = tmp_path / "from-elsewhere"
    folder.mkdir()
    tensors = {"encoder.weight": own.W_enc, "encoder.bias": own.b_enc}
    save_file(
        {name: tensor.detach().clone() for name, tensor in tensors.items()}
        | {"W_dec": own.W_dec.detach().clone(), "b_dec": own.b_dec.detach().clone()},
        folder / "sae.safetensors",
    )
    cfg = {"activation": "topk", "k": 4, "num_latents": 2 * D, "d_in": D, "expansion_factor": 2}
    (folder / "cfg.json").write_text(json.dumps(cfg))
    config = replace(harvested, eval=replace(harvested.eval, sae=str(folder)))
    with pytest.raises(StoreMismatchError, match=r"found .*or name its array with sae\.hookpoint"):
        metrics_of(config, tmp_path / "new")
    config = replace(config, sae=replace(config.sae, hookpoint=HOOKPOINT))
    found = metrics_of(config, tmp_path / "new")
    assert found["checkpoint"] == "from-elsewhere" and found["heldout"]
    for metric in METRICS.names():
        assert found[metric] == expected[metric], metric
    (tmp_path / "trained" / "checkpoints" / "step-00000007").mkdir(parents=True)
    (tmp_path / "trained" / "checkpoints" / "step-00000007" / "manifest.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"eval\.sae=.*a run without checkpoints of its own"):
        metrics_of(config, tmp_path / "trained")


def test_a_dictionary_that_never_fires_is_an_ablation(harvested: RunConfig, tmp_path: Path) -> None:
    store = open_store(harvested.store.path)
    mean = torch.from_numpy(store.read(HOOKPOINT, 0, store.n_tokens)).double().mean(0).float()
    never = {"b_enc": torch.full((2 * D,), -1e4)}
    save_sae(tmp_path / "zero", plus_minus(), k=4, **never)
    save_sae(tmp_path / "mean", plus_minus(), k=4, b_dec=mean, **never)
    zero, at_mean = (metrics_of(harvested, tmp_path / name) for name in ("zero", "mean"))
    assert zero["dead_fraction"] == 1 and zero["l0"] == 0
    assert zero["ce_recon"] == zero["ce_zero"] and zero["ce_recovered"] == 0
    assert at_mean["ce_recon"] == pytest.approx(zero["ce_mean"], abs=1e-6)
    assert at_mean["ce_recovered_mean"] == pytest.approx(0, abs=1e-3)
    assert zero["kl"] > 0 and zero["fvu"] > at_mean["fvu"] > 1


def test_metrics_agree_with_a_direct_computation(harvested: RunConfig, tmp_path: Path) -> None:
    sae = save_sae(tmp_path, torch.nn.functional.normalize(torch.randn(24, D), dim=1), k=3)
    config = replace(harvested, eval=replace(harvested.eval, tokens=10**6))  # all held-out text
    metrics = metrics_of(config, tmp_path)

    cache = Path(config.cache_dir)
    tokenizer = load_tokenizer(config.model, cache)
    split = prepare_contexts(config.data, tokenizer, cache).heldout
    ids = torch.from_numpy(split.input_ids(np.arange(len(split))))
    model = load_language_model(config.model, cache)
    hidden = model(ids, output_hidden_states=True).hidden_states[2]
    x = hidden[:, 1:][~torch.isin(ids[:, 1:], torch.tensor([0, 1]))].double()
    error = (x - sae(x).double()).square()
    assert metrics["rows"] == len(x) and metrics["tokens"] == ids.numel()
    variance = (x - x.mean(0)).square().sum()
    assert metrics["fvu"] == pytest.approx(float(error.sum() / variance), rel=1e-5)
    assert metrics["mse"] == pytest.approx(float(error.mean()), rel=1e-5)
    assert metrics["l0"] == pytest.approx(float((sae.encode(x) > 0).sum(1).double().mean()))

    # Run the rest of the model on the reconstruction, except at special tokens: the SAE was not
    # trained on their rows.
    special = torch.isin(ids, torch.tensor([0, 1]))
    assert special[:, 1:].any()
    spliced = torch.where(special[..., None], hidden, sae(hidden))
    model.get_submodule("model.layers.1").register_forward_hook(lambda *_: spliced)
    recon = model(ids).logits[:, 1:-1].log_softmax(-1)
    ce_recon = -recon.gather(-1, ids[:, 2:, None]).double().mean()
    assert metrics["ce_recon"] == pytest.approx(float(ce_recon), rel=1e-5)
    clean = load_language_model(config.model, cache)(ids).logits[:, 1:-1].log_softmax(-1)
    kl = (clean.exp() * (clean - recon)).sum(-1).double().mean()
    assert metrics["kl"] == pytest.approx(float(kl), rel=1e-4)
    ratio = (metrics["ce_zero"] - ce_recon) / (metrics["ce_zero"] - metrics["ce_clean"])
    assert metrics["ce_recovered"] == pytest.approx(float(ratio), rel=1e-3)


def test_a_metric_from_outside_sees_held_out_rows_and_predictions(
    harvested: RunConfig, tmp_path: Path
) -> None:
    class Seen(Accumulator):
        def __init__(self, sae: SAE) -> None:
            super().__init__(sae)
            self.squares, self.n_rows = 0.0, 0
            self.right: dict[str, int] = {}

        def add_rows(self, rows: Rows) -> None:
            self.squares += float((rows.x - rows.recon).double().square().sum())
            self.n_rows += len(rows.x)

        def add_predictions(self, predictions: Predictions) -> None:
            right = int((predictions.logits.argmax(-1) == predictions.clean.argmax(-1)).sum())
            self.right[predictions.variant] = self.right.get(predictions.variant, 0) + right

    def agreement(measured: Measured) -> float:
        right = measured[Seen].right
        return right["recon"] / right["clean"]

    error = Metric(
        "Error", "a definition", lambda m: m[Seen].squares / m[Seen].n_rows / D, accumulator=Seen
    )
    top1 = Metric("Top 1", "a definition", agreement, accumulator=Seen, format=".1%")
    save_sae(tmp_path, plus_minus(), k=D)
    with METRICS.registered("error", error), METRICS.registered("top1", top1):
        metrics = metrics_of(harvested, tmp_path)
        assert metrics["heldout"] and metrics["error"] == pytest.approx(metrics["mse"], rel=1e-5)
        assert metrics["top1"] == 1
        save_sae(tmp_path, plus_minus(), k=2)
        metrics = metrics_of(harvested, tmp_path)
        assert metrics["error"] == pytest.approx(metrics["mse"], rel=1e-5) and metrics["mse"] > 0
        assert metrics["top1"] < 1


def test_firing_counts_are_those_of_the_stored_rows(harvested: RunConfig, tmp_path: Path) -> None:
    sae = save_sae(tmp_path, plus_minus(), k=3, b_enc=-torch.arange(2.0 * D) / 4)
    metrics = metrics_of(harvested, tmp_path)
    store = open_store(harvested.store.path)
    latents = sae.encode(torch.from_numpy(store.read(HOOKPOINT, 0, store.n_tokens)))
    expected = (latents > 0).sum(0)
    frequency = json.loads((tmp_path / "eval" / "frequency.json").read_text())
    assert frequency == {
        "tokens": store.n_tokens,
        "of_tokens": store.n_tokens,
        "counts": expected.tolist(),
    }
    assert metrics["frequency_tokens"] == store.n_tokens and metrics["dead_in_training"] is None
    assert 0 < metrics["dead_fraction"] == float((expected == 0).double().mean()) < 1


def test_an_sae_larger_than_its_memory_is_evaluated_in_shards(
    harvested: RunConfig, tmp_path: Path
) -> None:
    W = torch.nn.functional.normalize(
        torch.randn(3000, D, generator=torch.Generator().manual_seed(0)), dim=1
    )
    save_sae(tmp_path, W, k=3)
    whole = metrics_of(harvested, tmp_path)
    counts = json.loads((tmp_path / "eval" / "frequency.json").read_text())
    assert (whole["device"], whole["compute_dtype"], whole["sae_shards"]) == ("cpu", "float32", 1)
    assert whole["sae_read_bytes"] == 2 * W.numel() * 4
    # 512 KiB: 85 latents per shard, so that encoding 64 rows takes an eighth of it.
    little = replace(harvested, eval=replace(harvested.eval, max_memory_gib=512 / 2**20))
    (tmp_path / "eval" / "metrics.json").unlink()  # a limit of memory changes no metric
    streamed = metrics_of(little, tmp_path)
    assert streamed["sae_shards"] > 4 and streamed["sae_read_bytes"] > whole["sae_read_bytes"]
    assert json.loads((tmp_path / "eval" / "frequency.json").read_text()) == counts
    differing = {"seconds", "inputs", "sae_shards", "sae_read_bytes"}
    for key in whole.keys() - differing:
        wanted = whole[key]
        if isinstance(wanted, float):
            # The KL divergence and the divisor of ce_recovered_mean are tiny here, so that float32
            # rounding counts.
            rel = 1e-3 if key == "ce_recovered_mean" else 1e-5
            wanted = pytest.approx(wanted, rel=rel, abs=1e-7)
        assert streamed[key] == wanted
    assert streamed["heldout"] and streamed["l0"] == whole["l0"]


def test_firings_are_counted_on_a_stated_sample(
    harvested: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(firing, "ROWS_PER_READ", 32)
    sae = save_sae(tmp_path, plus_minus(), k=3, b_enc=-torch.arange(2.0 * D) / 4)
    config = replace(harvested, eval=replace(harvested.eval, frequency_tokens=60))
    metrics = metrics_of(config, tmp_path)
    store = open_store(config.store.path)
    sample = firing.sample_rows(store, 60, config.seed)
    assert 60 <= metrics["frequency_tokens"] == sample.n_rows == 64 < store.n_tokens
    x = torch.cat([torch.from_numpy(store.read(HOOKPOINT, *block)) for block in sample.blocks])
    counts = (sae.encode(x) > 0).sum(0)
    frequency = json.loads((tmp_path / "eval" / "frequency.json").read_text())
    assert frequency == {"tokens": 64, "of_tokens": store.n_tokens, "counts": counts.tolist()}
    assert metrics["dead_fraction"] == float((counts == 0).double().mean())
    assert "none of frequency_tokens training rows" in metrics["definitions"]["dead_fraction"]

    report_stage.run(config, tmp_path)
    page = (tmp_path / "report" / "index.html").read_text(encoding="utf-8")
    assert "of all latents, on 64 sampled tokens" in page
    assert f"over 64 of {store.n_tokens} stored training tokens" in page
    assert "never fired (0 of 64 tokens)" in page


@pytest.mark.parametrize("stored", [HOOKPOINT, f"{HOOKPOINT}@output"])
def test_a_hookpoint_may_be_written_in_two_ways(
    harvested: RunConfig, tmp_path: Path, stored: str
) -> None:
    sae = save_sae(tmp_path / "a", plus_minus(), k=3)
    plain = metrics_of(harvested, tmp_path / "a")
    TopKInference(
        replace(sae.config, hookpoint=stored), sae.W_enc, sae.W_dec, sae.b_enc, sae.b_dec
    ).save(tmp_path / "b")
    listed = replace(harvested.model, hookpoints=[f"{HOOKPOINT}@output", "model.layers.0"])
    metrics = metrics_of(replace(harvested, model=listed), tmp_path / "b")
    assert metrics["heldout"] and metrics["hookpoint"] == HOOKPOINT
    assert (metrics["fvu"], metrics["ce_recon"]) == (plain["fvu"], plain["ce_recon"])


def test_cuda_without_a_gpu_is_refused(harvested: RunConfig, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    save_sae(tmp_path, plus_minus(), k=3)
    config = replace(harvested, train=replace(harvested.train, device="cuda"))
    with pytest.raises(ConfigError, match=r"train\.device='cuda'"):
        evaluation_stage.run(config, tmp_path)
    assert not (tmp_path / "eval").exists()


def test_it_runs_again_only_after_a_change(harvested: RunConfig, tmp_path: Path) -> None:
    save_sae(tmp_path, plus_minus(), k=3)
    first = metrics_of(harvested, tmp_path)
    assert metrics_of(harvested, tmp_path) == first  # even `seconds`, so nothing was measured
    fewer = replace(harvested, eval=replace(harvested.eval, tokens=64))
    assert metrics_of(fewer, tmp_path)["tokens"] == 64
    save_sae(tmp_path, plus_minus(), k=4)
    assert metrics_of(fewer, tmp_path)["l0"] > first["l0"]


def test_a_store_of_a_users_own_rows(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).normal(size=(100, D)).astype(np.float32)
    writer = StoreWriter(tmp_path / "store", {HOOKPOINT: D}, dtype="float32", shard_tokens=64)
    writer.write_item(0, {HOOKPOINT: rows[:64]})
    writer.write_item(1, {HOOKPOINT: rows[64:]})
    writer.finalise()
    sae = save_sae(tmp_path, plus_minus(), k=5)
    metrics = metrics_of(RunConfig(), tmp_path)
    error = (torch.from_numpy(rows) - sae(torch.from_numpy(rows))).double().square()
    variance = np.square(rows - rows.mean(0)).sum()
    assert metrics["fvu"] == pytest.approx(float(error.sum() / variance), rel=1e-4)
    assert metrics["heldout"] is False and "names no language model" in metrics["reason"]
    assert metrics["ce_recovered"] is None and metrics["kl"] is None
    assert metrics["tokens"] == 100


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dataset_sha256": "another text", "heldout_fraction": 0.01}, None),
        ({}, None),
        ({"heldout_fraction": 0.01}, "has rows of the same text, harvested with other settings"),
        ({"dataset_sha256": None}, "names no text"),
        (
            {"dataset_sha256": "a mixture", "heldout_fraction": 0.01, "dataset_mixture": []},
            "which may include the same text, harvested with other settings (heldout_fraction",
        ),
        ({"dataset_sha256": "a mixture", "dataset_mixture": []}, None),
    ],
)
def test_a_mixed_in_store_must_not_contain_the_heldout_text(
    harvested: RunConfig, tmp_path: Path, change: dict[str, Any], reason: str | None
) -> None:
    provenance = {**(open_store(harvested.store.path).header.provenance or {}), **change}
    writer = StoreWriter(
        tmp_path / "store", {HOOKPOINT: D}, dtype="float32", shard_tokens=64, provenance=provenance
    )
    writer.write_item(0, {HOOKPOINT: np.ones((64, D), np.float32)})
    writer.finalise()
    save_sae(tmp_path, plus_minus(), k=3)
    store = replace(harvested.store, mixture=[MixedStore(str(tmp_path / "store"))])
    metrics = metrics_of(replace(harvested, store=store), tmp_path)
    assert metrics["heldout"] is (reason is None)
    assert metrics["reason"] is None if reason is None else reason in metrics["reason"]


def test_a_store_with_other_harvest_settings_has_no_heldout_text(
    harvested: RunConfig, tmp_path: Path
) -> None:
    save_sae(tmp_path, plus_minus(), k=3)
    other = replace(harvested, data=replace(harvested.data, heldout_fraction=0.3))
    metrics = metrics_of(other, tmp_path)
    assert (
        metrics["ce_clean"] is None and "heldout_fraction: the store has 0.2" in metrics["reason"]
    )


def test_without_held_out_text_stored_rows_are_evaluated(
    harvested: RunConfig, tmp_path: Path
) -> None:
    save_sae(tmp_path, plus_minus(), k=3)
    config = replace(harvested, data=replace(harvested.data, heldout="none"))
    metrics = metrics_of(config, tmp_path)
    assert metrics["heldout"] is False and metrics["reason"] == "data.heldout=none"
    assert metrics["rows"] == open_store(harvested.store.path).n_tokens
    assert metrics["ce_recovered"] is None and metrics["fvu"] > 0


def test_the_last_part_of_each_document_is_evaluated(harvested: RunConfig, tmp_path: Path) -> None:
    data = replace(harvested.data, heldout="tokens")
    store = replace(harvested.store, path=str(tmp_path / "store"))
    config = replace(harvested, data=data, store=store)
    with ray_session(ClusterConfig(), min_cpus=2):
        harvest_stage.run(config, tmp_path / "run")
    save_sae(tmp_path, plus_minus(), k=D)
    metrics = metrics_of(config, tmp_path)
    assert metrics["heldout"] and metrics["ce_recovered"] == pytest.approx(1, abs=1e-3)
    header = open_store(config.store.path).header.provenance or {}
    assert header["heldout"] == "tokens"
    metrics = metrics_of(harvested, tmp_path)
    assert metrics["heldout"]  # the other store held out whole documents
    metrics = metrics_of(replace(harvested, store=store), tmp_path)
    assert "heldout: the store has 'tokens', this run has 'documents'" in metrics["reason"]


def test_a_store_of_another_width_is_refused(harvested: RunConfig, tmp_path: Path) -> None:
    config = TopKConfig(n_latents=4, k=2, hookpoint=HOOKPOINT)
    W = torch.eye(4, 3)
    TopKInference(config, W, W.clone(), torch.zeros(4), torch.zeros(3)).save(tmp_path)
    with pytest.raises(StoreMismatchError, match=r"of width 3, found .*16"):
        evaluation_stage.run(harvested, tmp_path)
