"""Show the resolved config as a tree, printed once when a run starts."""

from __future__ import annotations

from typing import Any

from omegaconf import OmegaConf
from rich.markup import escape
from rich.tree import Tree

from conf.schema.run import RunConfig


def config_tree(config: RunConfig) -> Tree:
    """Return the config as a tree, with one branch per group."""
    tree = Tree(f"[bold]{config.name}[/bold]", guide_style="dim")
    values: dict[str, Any] = OmegaConf.to_container(OmegaConf.structured(config))  # type: ignore[assignment]
    for key, value in values.items():
        if isinstance(value, dict):
            leaves = "  ".join(
                f"[dim]{name}[/dim] {escape(str(inner))}" for name, inner in value.items()
            )
            tree.add(f"[bold]{key}[/bold]  {leaves}")
        elif key != "name":
            tree.add(f"{key} {escape(str(value))}")
    return tree
