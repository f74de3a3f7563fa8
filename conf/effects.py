"""Find settings that have no effect in a run, so that it can tell the user about them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

from conf.schema.run import RunConfig


@dataclass(frozen=True)
class Rule:
    """Settings that have no effect under a condition."""

    keys: tuple[str, ...]
    """Names of settings, or of whole groups."""
    applies: Callable[[RunConfig], bool]
    reason: str
    only_given: bool = False
    """True to report the settings only if they are set on the command line. Experiments set values
    for all stages."""


def _unused_in(*stages: str) -> Callable[[RunConfig], bool]:
    return lambda config: config.stage not in stages and config.stage != "submit"


def _architecture(config: RunConfig, name: str, default: Any = None) -> Any:
    """Return a setting of the SAE that not every architecture has."""
    return getattr(config.sae, name, default)


_HARVESTS = ("pipeline", "plan", "harvest", "scaling_laws")
RULES = (
    Rule(
        ("sae.auxk", "sae.auxk_rows"),
        lambda config: _architecture(config, "auxk_coef") == 0,
        "sae.auxk_coef=0 switches the auxiliary loss off",
    ),
    Rule(
        ("sae.dead_after_tokens",),
        lambda config: (config.sae.dead_after_tokens or 0) >= config.train.tokens,
        "it is not below train.tokens, so no latent ever counts as dead and the auxiliary loss "
        "never runs",
    ),
    Rule(
        ("optim.lr_at_16k",),
        lambda config: config.optim.lr is not None,
        "optim.lr is set",
    ),
    Rule(
        ("checkpoint.keep_every_tokens",),
        lambda config: (config.checkpoint.keep_every_tokens or 0) > config.train.tokens,
        "it is more than train.tokens",
    ),
    Rule(
        ("cluster.max_lead_items",),
        lambda config: config.cluster.mode != "concurrent",
        "it limits the harvest only with cluster.mode=concurrent",
    ),
    Rule(
        ("store.weight",),
        lambda config: not config.store.mixture,
        "store.mixture lists no other store",
    ),
    Rule(
        ("parallel.zero_stage",),
        lambda config: config.parallel.data == 1,
        "parallel.data=1: there are no replicas to divide the optimiser state over",
    ),
    Rule(
        ("logging.wandb_project",),
        lambda config: config.logging.wandb == "disabled",
        "logging.wandb=disabled",
    ),
    Rule(
        ("model.revision",),
        lambda config: config.model.package is not None,
        "the model comes from the package model.package",
    ),
    Rule(
        ("store.dtype", "store.codec", "store.shard_tokens", "store.chunk_bytes"),
        _unused_in(*_HARVESTS),
        "the store exists already, and its header says how it was written",
        only_given=True,
    ),
    Rule(("sweep",), _unused_in("sweep", "scaling_laws", "plan"), "this run is not a sweep", True),
    Rule(("fit",), _unused_in("fit", "scaling_laws"), "nothing is fitted", True),
    Rule(("reshard",), _unused_in("reshard"), "nothing is resharded", True),
    Rule(("submit",), _unused_in("submit"), "no job is submitted", True),
    Rule(
        ("plan",),
        _unused_in("plan", "pipeline", "sweep", "scaling_laws"),
        "nothing is planned",
        only_given=True,
    ),
)


def without_effect(config: RunConfig, given: Collection[str]) -> Iterator[str]:
    """Yield one line for each setting that differs from its default but has no effect in this run.

    Args:
        config: The config.
        given: Keys that are set on the command line.
    """
    values, defaults = _flat(config), _flat(RunConfig(sae=type(config.sae)()))
    for rule in RULES:
        if not rule.applies(config):
            continue
        for key, value in values.items():
            covered = any(key == name or key.startswith(f"{name}.") for name in rule.keys)
            told = key in given if rule.only_given else value != defaults[key]
            if covered and told:
                yield f"{key}={value} has no effect: {rule.reason}"


def _flat(config: RunConfig) -> dict[str, Any]:
    """Return all settings by their full names."""
    values: dict[str, Any] = {}
    for group, part in vars(config).items():
        inner = getattr(part, "__dict__", None)
        if inner is None:
            values[group] = part
        else:
            values |= {f"{group}.{key}": value for key, value in inner.items()}
    return values
