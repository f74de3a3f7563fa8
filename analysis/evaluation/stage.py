"""Evaluate stage: measure the SAE on held-out text and count how often its latents fire.

The SAE is spliced into the language model while it runs on held-out contexts. A store that was not
harvested by this config, such as a user's own arrays, has no held-out text. In that case only the
reconstruction is measured, on a sample of the stored rows, and metrics.json gives the reason.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from analysis.evaluation.heldout import no_heldout_reason
from analysis.evaluation.measurement import Accumulator, Measured
from analysis.evaluation.metrics import METRICS, definitions, metric_rows
from cluster.run_folder.files import CHECKPOINTS, EVALUATION, FREQUENCY, store_path
from conf.hookpoint import find_hookpoint
from foundation.atomic_files import write_json
from foundation.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console
    from torch import Tensor

    from activation_store import Store
    from analysis.evaluation.firing import FiringPass, RowSample
    from analysis.evaluation.splice import SplicedEvaluation
    from conf.schema.run import RunConfig
    from sae_core.checkpoint.stored_sae import StoredSAE
    from sae_core.sharded_inference import ShardedSAE

_NO_HEAD = "no cross-entropy, as model.kind=base is a model without a language-model head"
_NO_TARGETS = (
    "no cross-entropy, as no held-out token after the first of its context is followed by another "
    "of its document; raise data.context_tokens"
)


LARGE_SHARE = 0.1
"""Share of the variance in 1% of the rows above which the evaluation warns."""
SMALL_CHANGE = 0.01
"""Change of the cross-entropy by mean ablation, in nats, below which the evaluation warns."""


@dataclass(frozen=True)
class Evaluation:
    """Inputs of one evaluation: the SAE, its config and store, and the console to print to."""

    config: RunConfig
    sae: ShardedSAE
    store: Store
    hookpoint: str
    """Name of the SAE's array in the store."""
    sample: RowSample
    """Stored rows on which firings are counted."""
    console: Console


def run(config: RunConfig, run_dir: Path) -> None:
    """Write `eval/metrics.json` and `eval/frequency.json`, unless they are up to date.

    Raises:
        CheckpointError: If the run has no valid checkpoint.
        ConfigError: If `train.device` is cuda on a machine without CUDA, or `eval.max_memory_gib`
            is too low.
        StoreError: If the store cannot be read, or its rows do not have the SAE's width.
        TextError: If the held-out text is shorter than one context.
    """
    from rich.console import Console

    from activation_store import open_store
    from analysis.evaluation.dictionary import compute_dtype_of, devices_of, shard_sae
    from analysis.evaluation.firing import sample_rows
    from sae_core.checkpoint.stored_sae import open_sae
    from sae_core.peer_formats import open_set

    console = Console(soft_wrap=True)
    started = time.monotonic()
    devices = devices_of(config)
    brought = config.eval.sae
    if brought is not None:
        _require_no_checkpoints(config, run_dir)
    stored = open_sae(run_dir) if brought is None else open_set("eval.sae", brought)
    store = open_store(store_path(config, run_dir))
    if brought is not None and config.sae.hookpoint is not None:
        stored = replace(stored, config=replace(stored.config, hookpoint=config.sae.hookpoint))
    hookpoint = _array_of(stored, store)
    name = f"step-{stored.step}" if brought is None else Path(brought).name
    checkpoint = str(stored.metadata.get("checkpoint", name))
    compute_dtype = str(compute_dtype_of(config, devices[0])).removeprefix("torch.")
    # Everything that the metrics depend on. If it is unchanged, the metrics are up to date.
    settings = asdict(config.eval)
    del settings["max_memory_gib"]  # changes only how the SAE is divided
    del settings["sae"]  # its weights count, not its path
    inputs = {
        "eval": settings,
        "data": asdict(config.data),
        "model": asdict(config.model),
        "seed": config.seed,
        "sae": asdict(stored.config),
        "weights_sha256": stored.weights_sha256(),
        "compute_dtype": compute_dtype,
        "store": [store.n_items, store.n_tokens, store.header.provenance],
        "mixture": [config.store.weight, *map(asdict, config.store.mixture)],
    }
    file = run_dir / EVALUATION
    if _is_up_to_date(file, inputs):
        console.print(f"evaluate: {file} is up to date with {checkpoint}")
        return
    sae = shard_sae(config, stored, devices)
    sample = sample_rows(store, config.eval.frequency_tokens, config.seed)
    evaluation = Evaluation(config, sae, store, hookpoint, sample, console)
    _announce(evaluation)
    metrics, counts = _evaluate(evaluation)
    metrics |= {
        "device": devices[0].type,
        "compute_dtype": compute_dtype,
        "sae_shards": sae.n_shards,
        "sae_read_bytes": sae.read_bytes,
        "hookpoint": hookpoint,
        "checkpoint": checkpoint,
        "seconds": round(time.monotonic() - started, 2),
        "definitions": definitions(),
        "inputs": inputs,
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    frequency = {"tokens": sample.n_rows, "of_tokens": sample.of_rows, "counts": counts}
    write_json(run_dir / FREQUENCY, frequency)
    write_json(file, metrics)
    _print_table(console, metrics)
    for line in _cautions(metrics):
        console.print(f"evaluate: {line}")


def _cautions(metrics: dict[str, Any]) -> list[str]:
    """Return what speaks against taking metrics at face value."""
    lines = []
    share = metrics.get("variance_top_1")
    if share is not None and share >= LARGE_SHARE:
        lines.append(
            f"1% of the rows hold {share:.0%} of the variance, so fvu mostly measures how well "
            "these are reconstructed; compare fvu_median, and see data.max_norm_multiple"
        )
    clean, ablated = metrics.get("ce_clean"), metrics.get("ce_mean")
    if clean is not None and ablated is not None and abs(ablated - clean) < SMALL_CHANGE:
        lines.append(
            f"the mean instead of the activations changes the cross-entropy by only "
            f"{ablated - clean:.2g} nats, so ce_recovered_mean and ce_recovered tell little"
        )
    return lines


def _require_no_checkpoints(config: RunConfig, run_dir: Path) -> None:
    """Check that the metrics of another SAE would not replace those of the run's own.

    Raises:
        ConfigError: If the run has checkpoints.
    """
    from sae_core.checkpoint.folder import list_checkpoints

    if list_checkpoints(run_dir / CHECKPOINTS):
        raise ConfigError(
            "eval.sae",
            config.eval.sae,
            f"a run without checkpoints of its own, but {run_dir} has some",
            "choose another name=...",
        )


def _announce(evaluation: Evaluation) -> None:
    """Print how the SAE is divided, if it does not fit, and the sample, if it is not all rows."""
    sae, sample = evaluation.sae, evaluation.sample
    if not sae.plan.resident:
        evaluation.console.print(
            f"evaluate: reading the SAE from disk (shards: {sae.n_shards}), once for at most "
            f"{sae.plan.rows_at_once:,} rows; raise eval.max_memory_gib to read it less often"
        )
    if sample.n_rows < sample.of_rows:
        evaluation.console.print(
            f"evaluate: counting firings on {sample.n_rows:,} of {sample.of_rows:,} stored rows "
            "(eval.frequency_tokens)"
        )


def _evaluate(evaluation: Evaluation) -> tuple[dict[str, Any], list[int]]:
    """Return the metrics, and each latent's number of firings."""
    from analysis.evaluation.firing import typical_row

    reason = no_heldout_reason(evaluation.config, evaluation.store, evaluation.hookpoint)
    kinds = {metric.accumulator for _, metric in METRICS.items() if metric.accumulator is not None}
    sums = {kind: kind(evaluation.sae) for kind in kinds}
    accumulators = list(sums.values())
    typical = typical_row(evaluation.store, evaluation.hookpoint, evaluation.sample)
    for accumulator in accumulators:
        accumulator.start(typical)
    firings = _count_firings(evaluation, accumulators if reason is not None else [])
    if reason is None:
        spliced, n_tokens = _run_spliced(evaluation, firings.mean, accumulators)
        n_rows = spliced.n_rows
    else:
        evaluation.console.print(f"evaluate: no held-out text, {reason}")
        n_rows = n_tokens = firings.n_rows
    dead_in_training = evaluation.sae.stored.dead_fraction()
    measured = Measured(sums, firings.counts, firings.n_rows, n_tokens, dead_in_training)
    metrics: dict[str, Any] = {
        name: _json_number(metric.value(measured)) for name, metric in METRICS.items()
    }
    metrics |= {"rows": n_rows, "heldout": reason is None, "reason": reason}
    if reason is None and not spliced.n_predictions:
        metrics["reason"] = _why_no_predictions(evaluation.config)
    return metrics, firings.counts.tolist()


def _why_no_predictions(config: RunConfig) -> str:
    return _NO_HEAD if config.model.kind == "base" else _NO_TARGETS


def _is_up_to_date(file: Path, inputs: dict[str, Any]) -> bool:
    """Return True if the file contains metrics for these inputs, with the same definitions."""
    if not file.is_file():
        return False
    written = json.loads(file.read_text())
    return bool(written.get("inputs") == inputs and written.get("definitions") == definitions())


def _json_number(value: float | int | None) -> float | int | None:
    """Return the value, or None if it is not finite: JSON has no NaN or infinity."""
    return value if value is not None and math.isfinite(value) else None


def _count_firings(evaluation: Evaluation, accumulators: list[Accumulator]) -> FiringPass:
    from analysis.evaluation.firing import count_firings
    from cluster.progress import ProgressLine

    sample = evaluation.sample
    with ProgressLine(evaluation.console) as line:
        return count_firings(
            evaluation.sae,
            evaluation.store,
            evaluation.hookpoint,
            sample,
            accumulators,
            progress=lambda rows: line.show(
                f"evaluate: firing counts {rows:,}/{sample.n_rows:,} stored rows"
            ),
        )


def _run_spliced(
    evaluation: Evaluation, mean: Tensor, accumulators: list[Accumulator]
) -> tuple[SplicedEvaluation, int]:
    """Evaluate on held-out text and return the evaluation and the number of tokens.

    Raises:
        TextError: If the text is shorter than one context, or no row of it is of those stored.
    """
    import numpy as np

    from analysis.evaluation.splice import SplicedEvaluation
    from cluster.language_model.errors import TextError
    from cluster.language_model.hooks import require_one_row_per_token
    from cluster.language_model.loading import load_language_model, load_tokenizer
    from cluster.language_model.model_checks import require_known_tokens, require_usable_model
    from cluster.language_model.packing import require_document_masks
    from cluster.language_model.tokens.contexts import prepare_contexts
    from cluster.progress import ProgressLine

    config = evaluation.config
    cache_dir = Path(config.cache_dir).expanduser()
    skeleton = require_usable_model(config.model, config.data.context_tokens, cache_dir)
    tokenizer = load_tokenizer(config.model, cache_dir, config.data.kind)
    contexts = prepare_contexts(config.data, tokenizer, cache_dir)
    require_known_tokens(skeleton, tokenizer, contexts)
    split = contexts.heldout
    wanted = max(1, config.eval.tokens // config.data.context_tokens)
    # A random sample of the held-out contexts, which depends only on the seed.
    order = np.random.default_rng([config.seed, 2]).permutation(len(split))[:wanted]
    if not len(order):
        raise TextError(
            f"data.heldout_fraction={config.data.heldout_fraction}: the held-out text is shorter "
            "than one context; raise the fraction, use a longer text, or harvest with "
            "data.heldout=tokens or data.heldout=none"
        )
    if len(order) < wanted:
        evaluation.console.print(
            f"evaluate: the text has only {len(order)} held-out contexts, fewer than eval.tokens="
            f"{config.eval.tokens:,} requires"
        )
    device = str(evaluation.sae.plan.devices[0])
    model = load_language_model(config.model, cache_dir, device)
    require_one_row_per_token(model, [evaluation.hookpoint])
    if config.data.packing == "masked":
        require_document_masks(model, [evaluation.hookpoint])
    spliced = SplicedEvaluation(
        model,
        evaluation.sae,
        evaluation.hookpoint,
        mean,
        accumulators,
        config.model.kind != "base",
        _max_norm(evaluation),
    )
    with ProgressLine(evaluation.console) as line:
        spliced.run(
            split,
            order,
            config.eval.batch_contexts,
            progress=lambda done: line.show(f"evaluate: {done}/{len(order)} held-out contexts"),
        )
    if not spliced.n_rows:
        raise TextError(
            f"the store keeps none of the rows of the {len(order)} held-out contexts that were "
            "evaluated: expected rows to measure; raise eval.tokens, or keep more rows with "
            "data.first_position, data.exclude_tokens and the other settings of rows"
        )
    if not spliced.n_predictions:
        evaluation.console.print(f"evaluate: {_why_no_predictions(config)}")
    return spliced, len(order) * config.data.context_tokens


def _max_norm(evaluation: Evaluation) -> float | None:
    """Return the largest norm of the rows that the store keeps, or None if it has no limit."""
    limits = (evaluation.store.header.provenance or {}).get("max_norms", {})
    name = find_hookpoint(evaluation.hookpoint, limits)
    return None if name is None else float(limits[name])


def _array_of(stored: StoredSAE, store: Store) -> str:
    """Return the array of the SAE's hookpoint, and check its width."""
    from activation_store.errors import StoreMismatchError

    wanted = stored.config.hookpoint
    if wanted is None:
        if len(store.arrays) > 1:
            raise StoreMismatchError(
                f"the SAE does not name its array: expected a store with one, found "
                f"{dict(store.arrays)}; set sae.hookpoint to its array"
            )
        wanted = next(iter(store.arrays))
    array = find_hookpoint(wanted, store.arrays) or wanted
    if store.arrays.get(array) != stored.d_model:
        raise StoreMismatchError(
            f"store.path: expected the SAE's training array {array!r} of width {stored.d_model}, "
            f"found {dict(store.arrays)}; set store.path to its store, or name its array with "
            "sae.hookpoint"
        )
    return array


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
