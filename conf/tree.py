"""Show the settings of a run that differ from the defaults, when the run starts."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any

from rich.markup import escape
from rich.tree import Tree

from conf.schema.run import RunConfig


def changed_settings(config: Any, default: Any, prefix: str = "") -> dict[str, Any]:
    """Return the settings that differ from those of `default`, as `{key: value}`.

    Args:
        config: A config, or one of its groups.
        default: A config or group of the same kind.
        prefix: Prefix of the keys, such as `sae.`.
    """
    found: dict[str, Any] = {}
    for part in fields(config):
        value = getattr(config, part.name)
        usual = getattr(default, part.name, None)
        if is_dataclass(value) and type(value) is type(usual):
            found |= changed_settings(value, usual, f"{prefix}{part.name}.")
        elif value != usual:
            found[f"{prefix}{part.name}"] = value
    return found


def config_tree(config: RunConfig) -> Tree:
    """Return the settings that differ from the schema's defaults as a tree, one line per group."""
    lines: dict[str, list[str]] = {}
    for key, value in changed_settings(config, RunConfig(name=config.name)).items():
        group, _, name = key.rpartition(".")
        shown = escape(str(value))
        lines.setdefault(group or key, []).append(f"[dim]{name}[/dim] {shown}" if group else shown)
    title = f"[bold]{config.name}[/bold]  [dim]changed settings; --cfg job shows all[/dim]"
    tree = Tree(title, guide_style="dim")
    for group, settings in lines.items():
        tree.add(f"[bold]{group}[/bold]  {'  '.join(settings)}")
    return tree
