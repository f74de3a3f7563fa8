"""The cells of a sweep: their names and configs. This file has no heavy imports."""

from __future__ import annotations

import copy
import re
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any, cast

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from conf.schema.run import RunConfig
from conf.schema.sweep import SweepConfig
from foundation.errors import ConfigError
from sae_core.architectures.registry import with_architecture
from sae_core.architectures.settings import SAEConfig

_OVERRIDABLE = ("sae.", "optim.", "train.tokens=")
"""Prefixes of the settings that an override may change for one cell.

Cells that are trained together share the row stream and the ranks, so the settings of these must be
the same in all cells.
"""
_NOT_OVERRIDABLE = ("sae.hookpoint=", "sae.n_latents=", "sae.k=", "sae.architecture=")
"""Settings of sae that an override may not change: the shared hookpoint, and the sweep's axes."""


def cells_of(config: RunConfig, run_dir: Path) -> dict[str, RunConfig]:
    """Return the sweep's cells, in order of increasing dictionary size.

    Returns:
        `{cell name: config of an ordinary run in run_dir/<cell>}`.

    Raises:
        ConfigError: If a cell's config is invalid, if two cells get the same name, or if an
            override names an unknown cell or a setting that must not be overridden.
    """
    sweep = config.sweep
    active: list[int | None] = [*sweep.k] or [None]
    axes = (
        sorted(sweep.n_latents) or [config.sae.n_latents],
        active,
        sweep.lr or [config.optim.lr],
        sweep.seed or [config.seed],
        sweep.architecture or [config.sae.architecture],
    )
    own = _by_cell(sweep.overrides)
    cells = {}
    for n_latents, k, lr, seed, architecture in product(*axes):
        sae = _settings(config.sae, architecture, n_latents, k)
        name = _name(sweep, sae, lr, seed)
        cell = replace(
            copy.deepcopy(config),
            name=name,
            stage="train",
            seed=seed,
            runs_dir=str(run_dir),
            sae=sae,
            optim=replace(config.optim, lr=lr),
            store=replace(config.store, order_seed=config.order_seed),
            sweep=SweepConfig(),
        )
        cell = _overridden(cell, name, own.get(name, []))
        cell.trainer.validate()
        if name in cells:
            # Names contain the learning rate rounded to 6 significant digits.
            raise ConfigError(
                "sweep.lr", sweep.lr, "rates that differ in their first 6 significant digits"
            )
        cells[name] = cell
    unknown = sorted(set(own) - set(cells))
    if unknown:
        raise ConfigError("sweep.overrides", unknown[0], f"a cell's name, one of {sorted(cells)}")
    return cells


def _settings(base: SAEConfig, architecture: str, n_latents: int, k: int | None) -> SAEConfig:
    """Return the settings of a cell: the settings in `base`, with the cell's values of the axes.

    Args:
        base: The sweep's settings. A cell with another architecture inherits the fields that both
            architectures have.
        architecture: The cell's architecture.
        n_latents: The cell's number of latents.
        k: The cell's number of active latents, or None if `k` is not an axis of the sweep.
    """
    values: dict[str, Any] = {"n_latents": n_latents} | ({} if k is None else {"k": k})
    settings = with_architecture(base, architecture)
    for axis, value in values.items():
        if not hasattr(settings, axis):
            raise ConfigError(
                f"sweep.{axis}",
                value,
                f"no values, because the architecture {architecture} has no setting sae.{axis}",
                "sweep the architectures that have this setting separately",
            )
    return replace(settings, **values)


def _name(sweep: SweepConfig, sae: SAEConfig, lr: float | None, seed: int) -> str:
    """Return a name like `n1024-k32-lr0.001-seed1-topk`.

    The learning rate, seed and architecture appear only if the sweep sets values for these axes. k
    appears only if the architecture has this setting.
    """
    parts = [f"n{sae.n_latents}"]
    parts += [f"k{sae.k}"] if hasattr(sae, "k") else []
    parts += [f"lr{'auto' if lr is None else f'{lr:g}'}"] if sweep.lr else []
    parts += [f"seed{seed}"] if sweep.seed else []
    parts += [re.sub(r"[^A-Za-z0-9._-]+", "_", sae.architecture)] if sweep.architecture else []
    return "-".join(parts)


def _by_cell(overrides: list[str]) -> dict[str, list[str]]:
    """Parse overrides of the form CELL:KEY=VALUE to `{cell name: its KEY=VALUE settings}`."""
    found: dict[str, list[str]] = {}
    for text in overrides:
        cell, colon, setting = text.partition(":")
        if not colon or "=" not in setting:
            raise ConfigError("sweep.overrides", text, "CELL:KEY=VALUE")
        found.setdefault(cell.strip(), []).append(setting.strip())
    return found


def _overridden(cell: RunConfig, name: str, settings: list[str]) -> RunConfig:
    """Return the cell's config with its KEY=VALUE overrides applied.

    Raises:
        ConfigError: If a key must not be overridden, a key is unknown, or a value is invalid.
    """
    for setting in settings:
        if not setting.startswith(_OVERRIDABLE) or setting.startswith(_NOT_OVERRIDABLE):
            raise ConfigError(
                "sweep.overrides",
                f"{name}:{setting}",
                "CELL:KEY=VALUE, where KEY is train.tokens, a setting of optim, or a setting of "
                "sae other than hookpoint, n_latents, k and architecture",
            )
    try:
        merged: Any = OmegaConf.merge(
            OmegaConf.structured(cell), OmegaConf.from_dotlist(list(settings))
        )
        return cast(RunConfig, OmegaConf.to_object(merged))
    except OmegaConfBaseException as error:
        what = str(error).splitlines()[0]
        raise ConfigError(
            "sweep.overrides", settings, f"known keys and valid values ({what})"
        ) from error
