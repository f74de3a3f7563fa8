"""The evaluate stage: what the dictionary keeps of held-out text, and how often its latents fire.

With the language model at hand the SAE is spliced into it over held-out contexts. A store that was
not harvested by this config, such as a person's own arrays, has no held-out text: then only
reconstruction is measured, on the stored rows, and metrics.json says so.
"""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.provenance import describe, differences, store_path
from sae_core.atomic import write_json

if TYPE_CHECKING:
    from rich.console import Console

    from activation_store import Store
    from analysis.frequency import FiringPass
    from conf.schema import RunConfig
    from sae_core import SAE

SAME_TEXT = (
    "weights_sha256",
    "tokenizer_sha256",
    "dataset_sha256",
    "context_tokens",
    "heldout_fraction",
    "dropped_special_tokens",
)
"""What the store and the config must agree on for the held-out text to be held out."""
SPLICED = ("ce_clean", "ce_recon", "ce_zero", "ce_mean", "ce_recovered", "ce_recovered_mean", "kl")
DEFINITIONS = {
    "fvu": "sum |x - recon|^2 / sum |x - mean|^2, raw activation units, mean of the same rows; the "
    "rows are those a store keeps (no position 0, no special tokens if they are dropped)",
    "mse": "mean of (x - recon)^2 over those rows and all dimensions, raw activation units",
    "l0": "mean number of latents above 0 in those rows",
    "dead_fraction": "latents above 0 on none of one pass over the training rows of store.path "
    "that are still stored (all of them, unless cluster.retention=consumed)",
    "ce_clean": "next-token cross-entropy in nats, predictions from position 1 on",
    "ce_recon": "the same with the SAE spliced in at every position but 0",
    "ce_zero": "the same with zeros spliced in",
    "ce_mean": "the same with the mean of the training rows stored at store.path spliced in",
    "ce_recovered": "(ce_zero - ce_recon) / (ce_zero - ce_clean)",
    "ce_recovered_mean": "(ce_mean - ce_recon) / (ce_mean - ce_clean)",
    "kl": "mean over predictions of KL(clean || recon), nats",
    "tokens": "tokens of the contexts that were run, BOS included; without held-out text, rows",
}


@dataclass(frozen=True)
class Evaluation:
    """One SAE, the store it was trained on, and where to report."""

    config: RunConfig
    sae: SAE
    store: Store
    hookpoint: str
    console: Console


def run(config: RunConfig, run_dir: Path) -> None:
    """Writes `eval/metrics.json` and `eval/frequency.json`; nothing to do if they are up to date.

    Raises:
        CheckpointError: The run has no valid checkpoint.
        StoreError: The store cannot be read, or is of another width.
    """
    from rich.console import Console

    from activation_store import open_store
    from sae_core import load_sae

    console = Console(soft_wrap=True)
    started = time.monotonic()
    sae = load_sae(run_dir)
    store = open_store(store_path(config, run_dir))
    hookpoint = sae.config.hookpoint or next(iter(store.arrays))
    _check_width(sae, store, hookpoint)
    checkpoint = str(sae.metadata.get("checkpoint", f"step-{sae.step}"))
    inputs = {
        "eval": asdict(config.eval),
        "data": asdict(config.data),
        "model": asdict(config.model),
        "seed": config.seed,
        "sae": asdict(sae.config),
        "weights_sha256": _weights_sha256(sae),
        "store": [store.n_items, store.n_tokens, store.header.provenance],
        "mixture": [config.store.weight, *map(asdict, config.store.mixture)],
    }
    file = run_dir / "eval" / "metrics.json"
    if file.is_file() and json.loads(file.read_text()).get("inputs") == inputs:
        console.print(f"evaluate: {file} is of {checkpoint} already")
        return
    evaluation = Evaluation(config, sae.to(_device(config)), store, hookpoint, console)
    metrics, counts, n_rows = _evaluate(evaluation)
    metrics |= {
        "hookpoint": hookpoint,
        "checkpoint": checkpoint,
        "seconds": round(time.monotonic() - started, 2),
        "definitions": DEFINITIONS,
        "inputs": inputs,
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file.with_name("frequency.json"), {"tokens": n_rows, "counts": counts})
    write_json(file, metrics)
    _print_table(console, metrics)


def _evaluate(evaluation: Evaluation) -> tuple[dict[str, Any], list[int], int]:
    """Metrics, how often each latent fired, and on how many rows that was counted."""
    reason = _why_not_heldout(evaluation)
    firings = _count_firings(evaluation, with_errors=reason is not None)
    if reason is None:
        measured = _spliced(evaluation, firings)
    else:
        evaluation.console.print(f"evaluate: no held-out text, {reason}")
        measured = {
            **_reconstruction(firings.sums),
            **dict.fromkeys(SPLICED),
            "tokens": firings.sums.rows,
        }
    metrics = {
        **measured,
        "dead_fraction": firings.dead_fraction,
        "heldout": reason is None,
        "reason": reason,
    }
    return metrics, firings.counts.tolist(), firings.sums.rows


def _why_not_heldout(evaluation: Evaluation) -> str | None:
    """Why there is no held-out text for this store under this config; None when there is."""
    config, provenance = evaluation.config, evaluation.store.header.provenance or {}
    if not provenance.get("weights_sha256"):
        return "the store's provenance names no language model"
    if evaluation.hookpoint not in config.model.hookpoints:
        return f"model.hookpoints={config.model.hookpoints} lacks {evaluation.hookpoint!r}"
    from cluster.models import load_tokenizer

    cache_dir = Path(config.cache_dir).expanduser()
    wanted = describe(config, load_tokenizer(config.model, cache_dir), cache_dir)
    found = differences(provenance, {key: wanted[key] for key in SAME_TEXT})
    if found:
        return f"the store was harvested otherwise ({'; '.join(found)})"
    return next(filter(None, (_may_hold(path, wanted) for path in config.store.paths[1:])), None)


def _may_hold(path: str, wanted: dict[str, Any]) -> str | None:
    """Why rows that were mixed in may be of the held-out text; None when they are not."""
    from activation_store import open_store

    provenance = open_store(path).header.provenance or {}
    text = provenance.get("dataset_sha256")
    if text is None:
        return f"the provenance of {path}, which was mixed in, names no text"
    if text != wanted["dataset_sha256"]:
        return None
    found = differences(provenance, {key: wanted[key] for key in SAME_TEXT})
    return (
        f"{path}, mixed in, holds the same text otherwise ({'; '.join(found)})" if found else None
    )


def _count_firings(evaluation: Evaluation, *, with_errors: bool) -> FiringPass:
    from analysis.frequency import count_firings
    from cluster.progress import ProgressLine

    store = evaluation.store
    with ProgressLine(evaluation.console) as line:
        return count_firings(
            evaluation.sae,
            store,
            evaluation.hookpoint,
            with_errors=with_errors,
            progress=lambda rows: line.show(
                f"evaluate: firing counts {rows:,}/{store.n_tokens:,} stored rows"
            ),
        )


def _spliced(evaluation: Evaluation, firings: FiringPass) -> dict[str, Any]:
    import numpy as np

    from analysis.splice import SplicedEvaluation
    from cluster.contexts import prepare_contexts
    from cluster.errors import TextError
    from cluster.models import load_language_model, load_tokenizer
    from cluster.progress import ProgressLine

    config = evaluation.config
    cache_dir = Path(config.cache_dir).expanduser()
    tokenizer = load_tokenizer(config.model, cache_dir)
    split = prepare_contexts(config.data, tokenizer, cache_dir).heldout
    wanted = max(1, config.eval.tokens // config.data.context_tokens)
    order = np.random.default_rng([config.seed, 2]).permutation(len(split))[:wanted]
    if not len(order):
        raise TextError(
            "data.heldout_fraction: the held-out part of the text is shorter than one context; "
            "raise it, or add text"
        )
    if len(order) < wanted:
        evaluation.console.print(
            f"evaluate: {len(order)} held-out contexts, fewer than eval.tokens="
            f"{config.eval.tokens:,} asks for"
        )
    model = load_language_model(config.model, cache_dir, _device(config))
    spliced = SplicedEvaluation(model, evaluation.sae, evaluation.hookpoint, firings.sums.mean)
    with ProgressLine(evaluation.console) as line:
        for start in range(0, len(order), config.eval.batch_contexts):
            spliced.add(split, order[start : start + config.eval.batch_contexts])
            done = min(start + config.eval.batch_contexts, len(order))
            line.show(f"evaluate: {done}/{len(order)} held-out contexts")
    tokens = len(order) * config.data.context_tokens
    return {**_reconstruction(spliced.rows), **spliced.losses.metrics(), "tokens": tokens}


def _reconstruction(sums: Any) -> dict[str, Any]:
    return {"fvu": sums.fvu, "mse": sums.mse, "l0": sums.l0, "rows": sums.rows}


def _check_width(sae: SAE, store: Store, hookpoint: str) -> None:
    from activation_store.errors import StoreMismatchError

    if store.arrays.get(hookpoint) != sae.d_model:
        raise StoreMismatchError(
            f"store.path: the SAE was trained on {hookpoint!r} of width {sae.d_model}; the store "
            f"holds {dict(store.arrays)}; set store.path to the store of this run"
        )


def _device(config: RunConfig) -> str:
    import torch

    wanted = config.train.device
    return "cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu"


def _weights_sha256(sae: SAE) -> str:
    sha256 = hashlib.sha256()
    for tensor in (sae.W_enc, sae.W_dec, sae.b_enc, sae.b_dec):
        sha256.update(tensor.detach().cpu().contiguous().numpy().data)
    return sha256.hexdigest()


def _print_table(console: Console, metrics: dict[str, Any]) -> None:
    from rich.table import Table

    where = "held-out text" if metrics["heldout"] else "stored rows"
    table = Table(title=f"{metrics['hookpoint']} · {metrics['checkpoint']} · {where}")
    table.add_column("metric")
    table.add_column("value", justify="right")
    for name in ("fvu", "mse", "l0", "dead_fraction", *SPLICED, "tokens"):
        value = metrics[name]
        if value is not None:
            table.add_row(name, f"{value:,}" if isinstance(value, int) else f"{value:.4g}")
    console.print(table)
