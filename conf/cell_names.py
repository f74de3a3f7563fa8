"""Sweeps (`-m`): each cell has a run folder of its own, named after what varies."""

from __future__ import annotations

import re
from collections import Counter

from hydra.conf import HydraConf
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

_CONSTANT = "hydra.job.config.override_dirname.exclude_keys"


def with_constants(arguments: list[str]) -> list[str]:
    """The command line; in a sweep with one override more, which names those that do not vary.

    Args:
        arguments: of the command line.
    """
    given = [word for word in arguments if "=" in word and not word.startswith("-")]
    if not given or not {"-m", "--multirun"} & set(arguments):
        return arguments
    try:
        overrides = OverridesParser.create().parse_overrides(given)
    except HydraException:
        return arguments  # Hydra says itself what is wrong
    keys = [override.key_or_group for override in overrides if not override.is_sweep_override()]
    before = arguments.index(given[0])  # flags may stand only before or after all overrides
    added = f"{_CONSTANT}=[{','.join(keys)}]"
    return [*arguments[:before], added, *arguments[before:]]


def cell_name(name: str, hydra: HydraConf) -> str:
    """The run's name in a sweep: `demo-k16-lr0.001`; the same in every sweep that has the cell.

    Args:
        name: of the sweep.
        hydra: of the cell.
    """
    constant = {"name", *hydra.job.config.override_dirname.exclude_keys}
    parsed = OverridesParser.create().parse_overrides(list(hydra.overrides.task))
    varied = [override for override in parsed if override.key_or_group not in constant]
    last = Counter(override.key_or_group.rsplit(".")[-1] for override in varied)
    parts = [name]
    for override in varied:
        key, value = override.key_or_group, override.get_value_element_as_str()
        short = key.rsplit(".")[-1]
        key = short if last[short] == 1 else key
        parts.append(f"{key}{value}" if value[:1].isdigit() else f"{key}-{value}")
    return re.sub(r"[^A-Za-z0-9._-]+", "_", "-".join(parts))
