"""Validate a run's config before any work and any heavy import."""

from __future__ import annotations

import math
import re
from dataclasses import fields, replace
from pathlib import Path

from conf.hookpoint import find_hookpoint
from conf.schema.run import RunConfig
from foundation.errors import ConfigError
from foundation.typed_json import LARGEST_INTEGER

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_CREDENTIALS = re.compile(r"://[^/@\s]*@")
_NEEDS_MODEL = {"hookpoints"}
_NEEDS_TEXT = {"pipeline", "plan", "harvest", "scaling_laws"}
_SWEEPS = {"sweep", "scaling_laws"}


def validate(config: RunConfig, stages: tuple[str, ...]) -> None:
    """Check the parts of the config that its stage uses, and that they are consistent.

    Args:
        config: The composed config.
        stages: Names that `stage` may have.

    Raises:
        ConfigError: If a value is invalid; the message names the key, the value and what was
            expected.
    """
    if config.stage not in stages:
        raise ConfigError("stage", config.stage, f"one of: {', '.join(stages)}")
    if not _NAME.fullmatch(config.name) or ".." in config.name:
        raise ConfigError(
            "name",
            config.name,
            "a name, not a path: at most 128 letters, digits, '.', '_' and '-', starting with a "
            "letter or digit and without '..'",
        )
    if config.seed < 0:
        raise ConfigError("seed", config.seed, "0 or more")
    _check_known(config)
    _check_finite(config)
    _check_no_credentials(config)
    config.trainer.validate()
    config.store.validate()
    config.eval.validate()
    config.fit.validate()
    if config.stage == "fit" and config.fit.runs is None:
        raise ConfigError(
            "fit.runs", None, "a folder of runs or a pattern, such as 'fit.runs=runs/sweep-*'"
        )
    config.sweep.validate()
    if config.stage in _SWEEPS:
        _check_sweep(config)
    config.reshard.validate()
    config.logging.validate()
    config.cluster.validate()
    config.plan.validate()
    if config.stage == "submit":
        _check_submit(config, stages)
    if config.stage in _NEEDS_MODEL:
        config.model.validate()
    if config.stage in _NEEDS_TEXT:
        config.model.validate()
        config.data.validate()
        _check_harvest_fits_store(config)


def _check_submit(config: RunConfig, stages: tuple[str, ...]) -> None:
    config.submit.validate()
    allowed = [stage for stage in stages if stage != "submit"]
    if config.submit.stage not in allowed:
        raise ConfigError("submit.stage", config.submit.stage, f"one of: {', '.join(allowed)}")
    # Validate the job's own stage now. Otherwise the job could wait in a queue for hours and then
    # fail.
    validate(replace(config, stage=config.submit.stage), stages)


def _check_sweep(config: RunConfig) -> None:
    from conf.sweep_cells import cells_of

    if config.cluster.mode != "sequential":
        raise ConfigError(
            "cluster.mode",
            config.cluster.mode,
            "sequential: the cells of a sweep may need several passes over a complete store",
        )
    for cell in cells_of(config, Path(config.runs_dir) / config.name).values():
        _check_finite(cell)


def _check_known(config: RunConfig) -> None:
    """Reject keys that `+key=value` added beside the groups, which nothing would read."""
    known = [one.name for one in fields(config)]
    for key, value in vars(config).items():
        if key not in known:
            raise ConfigError(key, value, f"one of the settings: {', '.join(known)}")


def _check_finite(config: RunConfig) -> None:
    """Reject NaN and infinities, because NaN would pass the range checks of the groups.

    Integers are limited, because checkpoints and stores take no others.
    """
    for group, part in vars(config).items():
        for key, value in getattr(part, "__dict__", {group: part}).items():
            name = group if key == group else f"{group}.{key}"
            if isinstance(value, float) and not math.isfinite(value):
                raise ConfigError(name, value, "a finite number")
            if isinstance(value, int) and abs(value) > LARGEST_INTEGER:
                raise ConfigError(name, value, "an integer between -2**62 and 2**62")


def _check_no_credentials(config: RunConfig) -> None:
    """Reject addresses that contain credentials, because the config is saved and logged."""
    for group, part in vars(config).items():
        for key, value in getattr(part, "__dict__", {group: part}).items():
            texts = [one.path for one in value] if key == "mixture" else value
            for text in texts if isinstance(texts, list) else [texts]:
                if isinstance(text, str) and _CREDENTIALS.search(text):
                    raise ConfigError(
                        group if key == group else f"{group}.{key}",
                        _CREDENTIALS.sub("://***@", text),
                        "an address without user name and password",
                        "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY instead",
                    )


def _check_harvest_fits_store(config: RunConfig) -> None:
    if config.model.shards > 1 and config.data.packing != "joined":
        raise ConfigError(
            "data.packing",
            config.data.packing,
            "joined with model.shards > 1",
            "set model.shards=1",
        )
    rows = config.data.context_tokens - 1
    if config.store.shard_tokens < rows:
        raise ConfigError(
            "store.shard_tokens",
            config.store.shard_tokens,
            f"at least {rows}, the rows of one context (data.context_tokens - 1)",
        )
    if config.data.tokens < config.train.batch_tokens:
        raise ConfigError(
            "data.tokens",
            config.data.tokens,
            f"at least one batch: train.batch_tokens={config.train.batch_tokens}",
        )
    _check_concurrent(config)
    hookpoint = config.sae.hookpoint
    if hookpoint is None and len(config.model.hookpoints) > 1 and config.stage != "harvest":
        raise ConfigError(
            "sae.hookpoint",
            None,
            f"one of model.hookpoints={config.model.hookpoints}, because an SAE is trained on one",
            f"set 'sae.hookpoint={config.model.hookpoints[0]}', and train on the others with "
            "stage=train and the same store.path",
        )
    if hookpoint is not None and find_hookpoint(hookpoint, config.model.hookpoints) is None:
        raise ConfigError(
            "sae.hookpoint", hookpoint, f"one of model.hookpoints={config.model.hookpoints}"
        )


def _check_concurrent(config: RunConfig) -> None:
    cluster, window = config.cluster, config.store.window_items
    if config.store.mixture and cluster.mode == "concurrent":
        raise ConfigError(
            "store.mixture",
            config.store.paths,
            "none with cluster.mode=concurrent: a mixture needs finalised stores",
            "use cluster.mode=sequential",
        )
    # Shards hold only whole contexts, so a shard can have fewer rows than store.shard_tokens.
    context_rows = config.data.context_tokens - 1
    rows_per_window = window * (config.store.shard_tokens // context_rows * context_rows)
    needed = window * (-(-config.train.batch_tokens // rows_per_window) + 1)
    if cluster.max_lead_items is not None and cluster.max_lead_items < needed:
        raise ConfigError(
            "cluster.max_lead_items",
            cluster.max_lead_items,
            f"at least {needed}: the windows (store.window_items={window}) that hold a batch of "
            f"train.batch_tokens={config.train.batch_tokens}, plus one window",
            "raise it, or harvest and training will wait for each other forever with "
            "cluster.mode=concurrent",
        )
    if cluster.retention == "consumed" and config.train.tokens > config.data.tokens:
        raise ConfigError(
            "cluster.retention",
            cluster.retention,
            f"keep, or train.tokens of at most data.tokens={config.data.tokens}",
            "use cluster.retention=keep, because training needs the rows more than once",
        )
