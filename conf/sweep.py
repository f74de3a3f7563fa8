"""Sweeps (`-m`): each cell has a run folder of its own, named after what varies."""

from __future__ import annotations

import re
from collections import Counter

from hydra.conf import HydraConf
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException


def constants(arguments: list[str]) -> list[str]:
    """An argument more, in a sweep, that tells its cells which overrides do not vary.

    Args:
        arguments: of the command line.
    """
    if not {"-m", "--multirun"} & set(arguments):
        return []
    given = [word for word in arguments if "=" in word and not word.startswith("-")]
    try:
        overrides = OverridesParser.create().parse_overrides(given)
    except HydraException:
        return []  # Hydra says so itself
    keys = [override.key_or_group for override in overrides if not override.is_sweep_override()]
    return [f"hydra.job.config.override_dirname.exclude_keys=[{','.join(keys)}]"]


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
