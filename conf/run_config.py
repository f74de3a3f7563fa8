"""The resolved config of a run on disk: written by the driver, read by every stage and rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from omegaconf import OmegaConf

from conf.schema import RunConfig

MAY_CHANGE = (
    "stage",
    "runs_dir",
    "cache_dir",
    "parallel",
    "checkpoint",
    "eval",
    "logging",
    "cluster",
    "submit",
    "train.tokens",
    "train.device",
    "train.compute_dtype",
    "train.kernels",
    "train.prefilter",
    "train.threads_per_rank",
    "train.timeout_s",
)
"""Keys and groups that a run may be resumed with another value of; all else makes another run."""


def save_config(config: RunConfig, path: Path) -> None:
    """Writes every key of the config as YAML."""
    path.write_text(OmegaConf.to_yaml(OmegaConf.structured(config)), encoding="utf-8")


def load_config(path: Path) -> RunConfig:
    """Reads what `save_config` wrote; every key typed, none unknown."""
    merged = OmegaConf.merge(OmegaConf.structured(RunConfig), OmegaConf.load(path))
    return cast(RunConfig, OmegaConf.to_object(merged))


def forbidden_changes(old: RunConfig, new: RunConfig) -> dict[str, tuple[Any, Any]]:
    """`{key: (old value, new value)}` of the keys that a resumed run may not change but does."""
    before, after = _flat(old), _flat(new)
    return {
        key: (before.get(key), after.get(key))
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key) and not _may_change(key)
    }


def _may_change(key: str) -> bool:
    return any(key == free or key.startswith(f"{free}.") for free in MAY_CHANGE)


def _flat(config: RunConfig) -> dict[str, Any]:
    def walk(prefix: str, value: Any) -> dict[str, Any]:
        if not isinstance(value, dict):
            return {prefix: value}
        found: dict[str, Any] = {}
        for key, inner in value.items():
            found |= walk(f"{prefix}.{key}" if prefix else str(key), inner)
        return found

    return walk("", OmegaConf.to_container(OmegaConf.structured(config)))
