"""Name the cells of a Hydra sweep (`-m`), so that each cell gets its own run folder.

A cell is one combination of the sweep's values. Its name lists the settings that vary in the sweep.
"""

from __future__ import annotations

import re
from collections import Counter

from hydra.conf import HydraConf
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

_CONSTANT_KEYS = "hydra.job.config.override_dirname.exclude_keys"


def with_constant_keys(arguments: list[str]) -> list[str]:
    """Return the arguments, with an override added for a sweep that lists the constant keys.

    Constant keys are those that do not vary between the cells of the sweep.

    Args:
        arguments: The arguments of the command line.
    """
    typed = [word for word in arguments if "=" in word and not word.startswith("-")]
    if not typed or not {"-m", "--multirun"} & set(arguments):
        return arguments
    try:
        overrides = OverridesParser.create().parse_overrides(typed)
    except HydraException:
        return arguments  # Hydra reports the error itself
    keys = [override.key_or_group for override in overrides if not override.is_sweep_override()]
    first = arguments.index(typed[0])  # Hydra allows flags only before or after all overrides
    return [*arguments[:first], f"{_CONSTANT_KEYS}=[{','.join(keys)}]", *arguments[first:]]


def cell_name(name: str, hydra: HydraConf) -> str:
    """Return the run name of a cell, such as `demo-k16-lr0.001`.

    The name depends only on the settings that vary. A cell therefore has the same name in every
    sweep over the same keys.

    Args:
        name: Name of the sweep.
        hydra: Hydra's config of the cell.
    """
    constant = {"name", *hydra.job.config.override_dirname.exclude_keys}
    parsed = OverridesParser.create().parse_overrides(list(hydra.overrides.task))
    varied = [override for override in parsed if override.key_or_group not in constant]
    endings = Counter(override.key_or_group.rsplit(".")[-1] for override in varied)
    parts = [name]
    for override in varied:
        key, value = override.key_or_group, override.get_value_element_as_str()
        short = key.rsplit(".")[-1]
        key = short if endings[short] == 1 else key
        parts.append(f"{key}{value}" if value[:1].isdigit() else f"{key}-{value}")
    return re.sub(r"[^A-Za-z0-9._-]+", "_", "-".join(parts))
