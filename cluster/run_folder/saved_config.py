"""Save and load the resolved config of a run.

The driver writes the config to `config.yaml`, from which every stage and rank reads it.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any, cast

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from cluster.run_folder.files import CONFIG, has_results
from cluster.run_folder.relocation import located, with_relative_paths
from conf.schema.run import RunConfig
from foundation.errors import ConfigError
from sae_core.architectures.registry import ARCHITECTURES
from sae_core.architectures.settings import SAEConfig

_MAX_CONFIG_BYTES = 1 << 20
_MAX_DEPTH = 16

CHANGEABLE_KEYS = (
    "stage",
    "runs_dir",
    "cache_dir",
    "parallel",
    "checkpoint",
    "eval",
    "fit",
    "reshard",
    "logging",
    "cluster",
    "submit",
    "sweep",
    "plan",
    "model.d_model",
    "model.n_parameters",
    "train.tokens",
    "train.device",
    "train.compute_dtype",
    "train.kernels",
    "train.prefilter",
    "train.cuda_graph",
    "train.threads_per_rank",
    "train.timeout_s",
    "train.hang_timeout_s",
)
"""Keys and groups that may change when a run is resumed. A change of any other key needs a new run.
"""


def save_config(config: RunConfig, path: Path) -> None:
    """Write every key of the config as YAML, with paths inside the run relative to its folder."""
    portable = with_relative_paths(config, path.parent)
    path.write_text(OmegaConf.to_yaml(OmegaConf.structured(portable)), encoding="utf-8")


def load_config(path: Path) -> RunConfig:
    """Read a config that `save_config` wrote, and check the type of every key.

    The name of the run and the paths inside it are those of the folder that contains `path`, which
    may have been moved or copied.

    The run folder may come from an untrusted source, so nothing in the file is resolved or
    constructed. An interpolation, for example, could copy an environment variable of this machine
    into a log.

    Raises:
        ConfigError: If the file has an interpolation, an alias, a tag, an unknown key, or a value
            of the wrong type, or if the run's architecture is not registered.
    """
    with open(path, "rb") as file:
        text = file.read(_MAX_CONFIG_BYTES + 1).decode("utf-8", errors="replace")
    try:
        _check_plain(path, text)
        values = OmegaConf.create(text)
        if "stage" not in values:
            raise _not_plain(path, "no settings")
        schema = RunConfig(sae=_settings_class(path, values)())
        schema.data.max_norm_multiple = None  # as before runs saved this key
        merged = OmegaConf.merge(OmegaConf.structured(schema), values)
        return located(cast(RunConfig, OmegaConf.to_object(merged)), path.parent)
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        what = "; ".join(line.strip() for line in str(error).splitlines() if line.strip())
        raise _not_plain(path, what[:300]) from error


def saved_config(run_dir: Path) -> RunConfig | None:
    """Return the config that the run was started with, or None if it was never started."""
    path = run_dir / CONFIG
    return load_config(path) if path.exists() else None


def continued(config: RunConfig, given: Collection[str]) -> tuple[RunConfig, list[str]]:
    """Return the config with which a stage continues an existing run.

    Args:
        config: The composed config.
        given: Keys that the user set.

    Returns:
        The saved config of the run with the keys in `given`, and one line for each key that
        changes. If the run has no results yet, `config` and no lines.

    Raises:
        ConfigError: As `load_config`.
    """
    run_dir = Path(config.runs_dir).expanduser().resolve() / config.name
    saved = saved_config(run_dir) if has_results(run_dir) else None
    if saved is None:
        return config, []
    composed = OmegaConf.structured(config)
    merged = OmegaConf.structured(saved)
    # Take `submit` from the user, because it says to which clusters a token may be sent.
    for key in {*given, "stage", "name", "runs_dir", "cache_dir", "submit"}:
        OmegaConf.update(merged, key, OmegaConf.select(composed, key), merge=False)
    result = cast(RunConfig, OmegaConf.to_object(merged))
    before, after = _flat(saved), _flat(result)
    places = ("stage", "name", "runs_dir", "cache_dir", "submit")
    lines = [
        f"{key}: {before.get(key)!r} -> {after.get(key)!r}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key) and key.partition(".")[0] not in places
    ]
    return result, lines


def _settings_class(path: Path, values: Any) -> type[SAEConfig]:
    """Return the class of the run's SAE settings. The default architecture is topk."""
    name = OmegaConf.select(values, "sae.architecture", default="topk")
    ARCHITECTURES.check(str(name), f"{path}: sae.architecture")
    return ARCHITECTURES[str(name)].settings


def _check_plain(path: Path, text: str) -> None:
    if len(text) > _MAX_CONFIG_BYTES:
        raise _not_plain(path, f"more than {_MAX_CONFIG_BYTES} bytes")
    # Inspect parser events, because parsing into events neither expands aliases nor builds objects.
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        where = f"line {event.start_mark.line + 1}" if event.start_mark else "the file"
        if isinstance(event, yaml.AliasEvent) or getattr(event, "tag", None) is not None:
            raise _not_plain(path, f"alias or tag in {where}")
        if isinstance(event, yaml.ScalarEvent) and "${" in event.value:
            raise _not_plain(path, f"interpolation in {where}")
        if isinstance(event, yaml.CollectionStartEvent | yaml.CollectionEndEvent):
            depth += 1 if isinstance(event, yaml.CollectionStartEvent) else -1
            if depth > _MAX_DEPTH:
                raise _not_plain(path, f"nested deeper than {_MAX_DEPTH} levels in {where}")


def _not_plain(path: Path, found: str) -> ConfigError:
    expected = "plain values under known keys, as written by the run"
    return ConfigError(str(path), found, expected, "restore the file, or use another run name")


def forbidden_changes(old: RunConfig, new: RunConfig) -> dict[str, tuple[Any, Any]]:
    """Find the keys that differ but that a resumed run may not change.

    Returns:
        `{key: (old value, new value)}`.
    """
    before, after = _flat(old), _flat(new)
    return {
        key: (before.get(key), after.get(key))
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key) and not _may_change(key)
    }


def _may_change(key: str) -> bool:
    return any(key == free or key.startswith(f"{free}.") for free in CHANGEABLE_KEYS)


def _flat(config: RunConfig) -> dict[str, Any]:
    def walk(prefix: str, value: Any) -> dict[str, Any]:
        if not isinstance(value, dict):
            return {prefix: value}
        found: dict[str, Any] = {}
        for key, inner in value.items():
            found |= walk(f"{prefix}.{key}" if prefix else str(key), inner)
        return found

    return walk("", OmegaConf.to_container(OmegaConf.structured(config)))
