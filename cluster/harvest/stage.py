"""The harvest stage: run text through the language model and store the activations.

The driver tokenises the text, plans the work items and creates the store, but never loads the
model's weights. Ray workers compute the items. A rerun computes only the items that are missing.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.errors import PlacementError
from cluster.harvest.norm_profile import as_json
from cluster.harvest.norms import dropped_line, max_norms, statistics_line
from cluster.harvest.provenance import describe, matching_store
from cluster.run_folder.files import HARVEST, HARVEST_STARTS, consumer_name, store_path
from foundation.atomic_files import write_json

if TYPE_CHECKING:
    from rich.console import Console

    from activation_store import HarvestLock, StoreWriter
    from cluster.harvest.items import ItemPlan
    from cluster.harvest.worker_pool import WorkerPool
    from conf.schema.run import RunConfig


_SPARE_SHARE = 0.01
"""Share of rows harvested beyond `data.tokens` if rows may be left out and each is used once."""


@dataclass(frozen=True)
class HarvestJob:
    """A harvest that is planned and ready to run."""

    config: RunConfig
    run_dir: Path
    store: str
    plan: ItemPlan
    provenance: dict[str, Any]
    tokenizer: Any
    harvest_lock: HarvestLock
    """This run's harvest lock on the store. It is taken before the first item, and the caller of
    `prepare` releases it."""
    resuming: bool
    """True if the store already exists."""
    console: Console
    live: bool
    """True if progress may be shown as a live line on the terminal."""


MayStart = Callable[[int | None], bool]
"""Function that returns True if the item with the given number may start now. It is called with
None when no item is being considered, and the result is then ignored. It raises to end the
harvest."""


def run(config: RunConfig, run_dir: Path) -> None:
    """Fill the store with `data.tokens` rows per hookpoint. Do nothing if it is already full.

    Writes `harvest.json` to the run folder with the keys tokens, items, seconds, tokens_per_s,
    workers, dropped_by_norm, hookpoints, store_bytes and norms (by position and token). `seconds`,
    `tokens_per_s` and `dropped_by_norm` cover this session only, from the start of Ray until the
    store is finalised.
    `tokens_per_s` is null if no item was left to compute.

    Raises:
        StoreMismatchError: If the store was harvested with other settings. Raised before any work.
        ModelError: If the model or a hookpoint does not exist.
        TextError: If the text is missing, empty or unreadable.
        PlacementError: If the cluster has no room for the workers.
        ConfigError: If a hookpoint is malformed or of an unknown kind, or the model cannot be split
            into `model.shards` parts.
        StoreBusyError: If another run is harvesting this store. The error names that run.
    """
    job = prepare(config, run_dir)
    if job is not None:
        with job.harvest_lock:
            fill(job)


def prepare(
    config: RunConfig, run_dir: Path, console: Console | None = None, live: bool = True
) -> HarvestJob | None:
    """Tokenise the text and plan the harvest.

    Args:
        config: Configuration of the run.
        run_dir: Folder of the run.
        console: Console on which progress is shown. If None, a new console on standard output.
        live: Show progress as one live line on a terminal. Use False when another progress
            display already has that line.

    Returns:
        The planned harvest, or None if the store is already full.

    Raises:
        StoreMismatchError: If the store was harvested with other settings.
        ModelError: If the model or a hookpoint does not exist, or the model's files are incomplete
            or do not belong to the tokenizer.
        TextError: If the text is missing, empty or unreadable.
        ConfigError: If a hookpoint is malformed or of an unknown kind, a context is longer than the
            model allows, or the model cannot be split into `model.shards` parts.
    """
    from rich.console import Console

    from activation_store import HarvestLock
    from cluster.harvest.items import plan_items
    from cluster.harvest.text_report import counts_lines, require_splits, token_lines
    from cluster.language_model.hookpoint_kinds import require_usable
    from cluster.language_model.loading import load_tokenizer
    from cluster.language_model.model_checks import require_known_tokens, require_usable_model
    from cluster.language_model.tensor_parallel import require_shardable
    from cluster.language_model.texts import find_text, pin_revisions, require_text
    from cluster.language_model.tokens.contexts import prepare_contexts

    console = console or Console(soft_wrap=True)
    cache_dir = Path(config.cache_dir).expanduser()
    require_text(config.data)
    config = replace(config, data=pin_revisions(config.data))
    require_usable(config.model)
    require_shardable(config.model, cache_dir)
    skeleton = require_usable_model(config.model, config.data.context_tokens, cache_dir)
    path = store_path(config, run_dir)
    tokenizer = load_tokenizer(config.model, cache_dir, config.data.kind)
    provenance = describe(config, tokenizer, cache_dir)
    existing = matching_store(path, config, provenance)
    if existing and existing.finalised:
        console.print(f"harvest: {path} already holds all {existing.n_tokens:,} rows")
        if not (run_dir / HARVEST).is_file():
            _write_summary(config, run_dir, path, {"seconds": 0.0, "tokens_per_s": None})
        return None
    for line in find_text(config.data).summary():
        console.print(f"text: {line}", markup=False)
    contexts = prepare_contexts(config.data, tokenizer, cache_dir)
    require_known_tokens(skeleton, tokenizer, contexts)
    for line in (
        *counts_lines(contexts, config.eval.tokens),
        *token_lines(contexts, tokenizer, config.data.kind),
    ):
        console.print(f"text: {line}", markup=False)
    require_splits(contexts, config.data)
    tokens = config.data.tokens
    if config.cluster.retention == "consumed" and config.data.max_norm_multiple is not None:
        # Training sees every row once and needs up to `data.tokens` of them, but rows of huge norm
        # are left out only when they are computed.
        tokens = math.ceil(tokens * (1 + _SPARE_SHARE))
    plan = plan_items(contexts.train, config.seed, tokens, config.store.shard_tokens)
    if plan.n_rows < config.data.tokens:
        console.print(
            f"harvest: the text yields only {plan.n_rows:,} rows, fewer than data.tokens="
            f"{config.data.tokens:,}; storing all of them"
        )
    harvest_lock = HarvestLock(path, consumer_name(config, run_dir))
    return HarvestJob(
        config,
        run_dir,
        path,
        plan,
        provenance,
        tokenizer,
        harvest_lock,
        bool(existing),
        console,
        live,
    )


def fill(job: HarvestJob, may_start: MayStart = lambda _: True) -> None:
    """Compute the missing items, finalise the store and write `harvest.json`.

    Args:
        job: The harvest that `prepare` planned.
        may_start: Items wait while this function returns False. If it raises, the harvest ends.
    """
    from activation_store import open_store

    session = _fill(job, may_start)
    _write_summary(job.config, job.run_dir, job.store, session)
    n_tokens = open_store(job.store).n_tokens
    job.console.print(f"harvest: {n_tokens:,} rows in {job.store}")


def _fill(job: HarvestJob, may_start: MayStart) -> dict[str, Any]:
    from activation_store import StoreWriter
    from cluster.harvest.worker import WorkerSpec
    from cluster.harvest.worker_pool import WorkerPool
    from cluster.ray_session import ray_session

    config = job.config
    if job.resuming:
        job.harvest_lock.acquire()  # fail before Ray and the workers are started
    started = time.monotonic()
    shards = config.model.shards
    with ray_session(config.cluster, min_cpus=config.cluster.harvest_workers * shards):
        n_workers, device = _workers(config.cluster.harvest_workers, shards, job.console)
        spec = WorkerSpec(
            model=config.model,
            data=config.data,
            seed=config.seed,
            store_path=job.store,
            cache_dir=Path(config.cache_dir).expanduser().resolve(),
            device=device,
            starts_dir=(job.run_dir / HARVEST_STARTS).resolve(),
        )
        with WorkerPool(spec, n_workers, config.cluster) as pool:
            writer = StoreWriter(job.store) if job.resuming else _create(job, pool)
            job.harvest_lock.acquire()
            rows, dropped = _run_items(job, pool, writer, may_start)
        writer.finalise()
    seconds = time.monotonic() - started
    return {
        "seconds": round(seconds, 2),
        "tokens_per_s": round(rows / seconds, 1) if rows else None,
        "workers": n_workers,
        "dropped_by_norm": dropped,
    }


def _workers(wanted: int, shards: int, console: Console) -> tuple[int, str]:
    import ray

    gpus = int(ray.cluster_resources().get("GPU", 0))
    if not gpus:
        return wanted, "cpu"
    room = gpus // shards
    if not room:
        raise PlacementError(
            f"model.shards={shards}: expected at most {gpus}, the number of GPUs in the cluster; "
            "lower model.shards or add GPUs"
        )
    if room < wanted:
        console.print(
            f"harvest: using {room} workers, the most that fit on {gpus} GPUs "
            f"(cluster.harvest_workers={wanted})"
        )
    return min(wanted, room), "cuda"


def _create(job: HarvestJob, pool: WorkerPool) -> StoreWriter:
    from activation_store import StoreWriter

    job.console.print("harvest: loading the model and calibrating on the first item")
    calibration, norms, profiles = pool.calibrate((0, job.plan.contexts(0)))
    for name, one in norms.items():
        line = statistics_line(name, one, job.tokenizer)
        job.console.print(f"harvest: {line}", markup=False)
    limits = max_norms(norms, job.config.data.max_norm_multiple)
    store = job.config.store
    return StoreWriter(
        job.store,
        {name: len(moments.mean) for name, moments in calibration.items()},
        dtype=store.dtype,
        codec=store.codec,
        shard_tokens=store.shard_tokens,
        chunk_bytes=store.chunk_bytes,
        n_items=job.plan.n_items,
        provenance=job.provenance
        | ({"max_norms": limits} if limits else {})
        | {"norms": as_json(profiles, job.tokenizer)},
        calibration=calibration,
    )


def _run_items(
    job: HarvestJob, pool: WorkerPool, writer: StoreWriter, may_start: MayStart
) -> tuple[int, int]:
    """Compute the missing items.

    Returns:
        The numbers of rows that were stored, and that were left out because of their norm, in this
        session.
    """
    from cluster.progress import ProgressLine, duration

    plan = job.plan
    committed = writer.committed_items()
    todo = [item for item in range(plan.n_items) if item not in committed]
    if committed:
        job.console.print(
            f"harvest: {len(committed)} of {plan.n_items} items are already committed"
        )
    rows = 0
    finished = 0
    dropped: Counter[int] = Counter()

    def check_and_may_start(item: int | None) -> bool:
        job.harvest_lock.check()  # stop writing as soon as another run holds the harvest lock
        return may_start(item)

    started = time.monotonic()
    with ProgressLine(job.console, live=job.live) as line:
        for result in pool.run(((item, plan.contexts(item)) for item in todo), check_and_may_start):
            if result is not None:
                rows += result.rows
                dropped += result.dropped
                finished += 1
            seconds = time.monotonic() - started
            # Calibration already computed the first item, so that item's time says nothing about
            # the rate.
            known = finished > 1
            eta = duration(seconds / finished * (len(todo) - finished)) if known else "?"
            rate = f"{rows / seconds:,.0f}" if known else "?"
            done = len(committed) + finished
            line.show(
                f"harvest {done / plan.n_items:4.0%} · {done}/{plan.n_items} items · "
                f"{rows:,} rows · {rate} tokens/s · ETA {eta}"
            )
    multiple = job.config.data.max_norm_multiple
    if dropped and multiple is not None:
        told = dropped_line(dropped, rows, multiple, job.tokenizer)
        job.console.print(f"harvest: {told}", markup=False)
    return rows, dropped.total()


def _write_summary(config: RunConfig, run_dir: Path, path: str, session: dict[str, Any]) -> None:
    from activation_store import open_store

    store = open_store(path)
    summary = {
        "tokens": store.n_tokens,
        "items": store.n_items,
        **session,
        "hookpoints": list(config.model.hookpoints),
        "store_bytes": store.n_bytes,
        "norms": (store.header.provenance or {}).get("norms", {}),
    }
    run_dir.mkdir(parents=True, exist_ok=True)
    write_json(run_dir / HARVEST, summary)
