"""Evaluate stage: measure the SAE on held-out text and count how often its latents fire.

The SAE is spliced into the language model while it runs on held-out contexts. A store that was not
harvested by this config, such as a user's own arrays, has no held-out text. In that case only the
reconstruction is measured, on the stored rows, and metrics.json gives the reason.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from analysis.evaluation.measurement import Accumulator, Measured
from analysis.evaluation.metrics import METRICS, definitions, metric_rows
from cluster.harvest.provenance import describe, differences
from cluster.run_folder.files import EVALUATION, FREQUENCY, store_path
from foundation.atomic_files import write_json

if TYPE_CHECKING:
    from rich.console import Console
    from torch import Tensor

    from activation_store import Store
    from analysis.evaluation.firing import FiringPass
    from conf.schema.run import RunConfig
    from sae_core import SAE

SPLIT_PROVENANCE_KEYS = (
    "weights_sha256",
    "tokenizer_sha256",
    "dataset_sha256",
    "context_tokens",
    "heldout_fraction",
    "dropped_special_tokens",
)
"""Provenance keys that must match between store and config.

If a value differs, the store may contain rows from another model, or rows from contexts that this
config holds out.
"""


@dataclass(frozen=True)
class Evaluation:
    """Inputs of one evaluation: the SAE, its config and store, and the console to print to."""

    config: RunConfig
    sae: SAE
    store: Store
    hookpoint: str
    console: Console


def run(config: RunConfig, run_dir: Path) -> None:
    """Write `eval/metrics.json` and `eval/frequency.json`, unless they are up to date.

    Raises:
        CheckpointError: If the run has no valid checkpoint.
        StoreError: If the store cannot be read, or its rows do not have the SAE's width.
        TextError: If the held-out text is shorter than one context.
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
    # Everything that the metrics depend on. If it is unchanged, the metrics are up to date.
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
    file = run_dir / EVALUATION
    if _is_up_to_date(file, inputs):
        console.print(f"evaluate: {file} is up to date with {checkpoint}")
        return
    evaluation = Evaluation(config, sae.to(_device(config)), store, hookpoint, console)
    metrics, counts, n_rows = _evaluate(evaluation)
    metrics |= {
        "hookpoint": hookpoint,
        "checkpoint": checkpoint,
        "seconds": round(time.monotonic() - started, 2),
        "definitions": definitions(),
        "inputs": inputs,
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(run_dir / FREQUENCY, {"tokens": n_rows, "counts": counts})
    write_json(file, metrics)
    _print_table(console, metrics)


def _evaluate(evaluation: Evaluation) -> tuple[dict[str, Any], list[int], int]:
    """Return the metrics, each latent's number of firings, and the number of rows counted."""
    reason = _no_heldout_reason(evaluation)
    kinds = {metric.accumulator for _, metric in METRICS.items() if metric.accumulator is not None}
    sums = {kind: kind(evaluation.sae) for kind in kinds}
    accumulators = list(sums.values())
    firings = _count_firings(evaluation, accumulators if reason is not None else [])
    if reason is None:
        n_rows, n_tokens = _run_spliced(evaluation, firings.mean, accumulators)
    else:
        evaluation.console.print(f"evaluate: no held-out text, {reason}")
        n_rows = n_tokens = firings.n_rows
    measured = Measured(sums, firings.counts, firings.n_rows, n_tokens)
    metrics: dict[str, Any] = {
        name: _json_number(metric.value(measured)) for name, metric in METRICS.items()
    }
    metrics |= {"rows": n_rows, "heldout": reason is None, "reason": reason}
    return metrics, firings.counts.tolist(), firings.n_rows


def _is_up_to_date(file: Path, inputs: dict[str, Any]) -> bool:
    """Return True if the file contains metrics for these inputs, with the same definitions."""
    if not file.is_file():
        return False
    written = json.loads(file.read_text())
    return bool(written.get("inputs") == inputs and written.get("definitions") == definitions())


def _json_number(value: float | int | None) -> float | int | None:
    """Return the value, or None if it is not finite: JSON has no NaN or infinity."""
    return value if value is not None and math.isfinite(value) else None


def _no_heldout_reason(evaluation: Evaluation) -> str | None:
    """Return why this store has no held-out text under this config, or None if it has some.

    Mixed-in rows are checked as well, because they must not come from the held-out text.
    """
    config, provenance = evaluation.config, evaluation.store.header.provenance or {}
    if not provenance.get("weights_sha256"):
        return "the store's provenance names no language model"
    if evaluation.hookpoint not in config.model.hookpoints:
        return f"model.hookpoints={config.model.hookpoints} does not list {evaluation.hookpoint!r}"
    from cluster.language_model.loading import load_tokenizer

    cache_dir = Path(config.cache_dir).expanduser()
    wanted = describe(config, load_tokenizer(config.model, cache_dir), cache_dir)
    found = differences(provenance, {key: wanted[key] for key in SPLIT_PROVENANCE_KEYS})
    if found:
        return f"the store was harvested with other settings ({'; '.join(found)})"
    for path in config.store.paths[1:]:
        reason = _contamination_reason(path, wanted)
        if reason is not None:
            return reason
    return None


def _contamination_reason(path: str, wanted: dict[str, Any]) -> str | None:
    """Return why the mixed-in store may contain held-out text, or None if it cannot.

    A store of another text cannot. Neither can a store of the same text with the same split.
    """
    from activation_store import open_store

    provenance = open_store(path).header.provenance or {}
    text = provenance.get("dataset_sha256")
    if text is None:
        return f"the provenance of the mixed-in store {path} names no text"
    if text != wanted["dataset_sha256"]:
        return None
    found = differences(provenance, {key: wanted[key] for key in SPLIT_PROVENANCE_KEYS})
    if not found:
        return None
    return (
        f"the mixed-in store {path} has rows of the same text, harvested with other settings "
        f"({'; '.join(found)})"
    )


def _count_firings(evaluation: Evaluation, accumulators: list[Accumulator]) -> FiringPass:
    from analysis.evaluation.firing import count_firings
    from cluster.progress import ProgressLine

    store = evaluation.store
    with ProgressLine(evaluation.console) as line:
        return count_firings(
            evaluation.sae,
            store,
            evaluation.hookpoint,
            accumulators,
            progress=lambda rows: line.show(
                f"evaluate: firing counts {rows:,}/{store.n_tokens:,} stored rows"
            ),
        )


def _run_spliced(
    evaluation: Evaluation, mean: Tensor, accumulators: list[Accumulator]
) -> tuple[int, int]:
    """Evaluate on held-out text and return the numbers of rows and tokens."""
    import numpy as np

    from analysis.evaluation.splice import SplicedEvaluation
    from cluster.language_model.contexts import prepare_contexts
    from cluster.language_model.errors import TextError
    from cluster.language_model.loading import load_language_model, load_tokenizer
    from cluster.progress import ProgressLine

    config = evaluation.config
    cache_dir = Path(config.cache_dir).expanduser()
    tokenizer = load_tokenizer(config.model, cache_dir)
    split = prepare_contexts(config.data, tokenizer, cache_dir).heldout
    wanted = max(1, config.eval.tokens // config.data.context_tokens)
    # A random sample of the held-out contexts, which depends only on the seed.
    order = np.random.default_rng([config.seed, 2]).permutation(len(split))[:wanted]
    if not len(order):
        raise TextError(
            f"data.heldout_fraction={config.data.heldout_fraction}: the held-out text is shorter "
            "than one context; raise the fraction, or use a longer text"
        )
    if len(order) < wanted:
        evaluation.console.print(
            f"evaluate: the text has only {len(order)} held-out contexts, fewer than eval.tokens="
            f"{config.eval.tokens:,} requires"
        )
    model = load_language_model(config.model, cache_dir, _device(config))
    spliced = SplicedEvaluation(model, evaluation.sae, evaluation.hookpoint, mean, accumulators)
    with ProgressLine(evaluation.console) as line:
        for start in range(0, len(order), config.eval.batch_contexts):
            spliced.add(split, order[start : start + config.eval.batch_contexts])
            done = min(start + config.eval.batch_contexts, len(order))
            line.show(f"evaluate: {done}/{len(order)} held-out contexts")
    return spliced.n_rows, len(order) * config.data.context_tokens


def _check_width(sae: SAE, store: Store, hookpoint: str) -> None:
    from activation_store.errors import StoreMismatchError

    if store.arrays.get(hookpoint) != sae.d_model:
        raise StoreMismatchError(
            f"store.path: expected the SAE's training array {hookpoint!r} of width {sae.d_model}, "
            f"found {dict(store.arrays)}; set store.path to the store of this run"
        )


def _device(config: RunConfig) -> str:
    import torch

    wanted = config.train.device
    return "cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu"


def _weights_sha256(sae: SAE) -> str:
    from sae_core.checkpoint.stored_sae import row_names

    sha256 = hashlib.sha256()
    for name in (*row_names(sae.config), "b_dec"):
        tensor = getattr(sae, name)
        sha256.update(tensor.detach().cpu().contiguous().numpy().data)
    return sha256.hexdigest()


def _print_table(console: Console, metrics: dict[str, Any]) -> None:
    from rich.table import Table

    where = "held-out text" if metrics["heldout"] else "stored rows"
    table = Table(title=f"{metrics['hookpoint']} · {metrics['checkpoint']} · {where}")
    table.add_column("metric")
    table.add_column("value", justify="right")
    table.add_column("unit")
    for row in metric_rows(metrics):
        if row.value is not None:
            table.add_row(row.name, row.value, row.unit)
    console.print(table)
