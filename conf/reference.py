"""Reference of all config keys, with their types, defaults and docstrings from the schema."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any, NamedTuple

from conf.schema.run import RunConfig
from foundation.errors import ConfigError


class Key(NamedTuple):
    """One setting."""

    name: str
    """Name on the command line: `sae.n_latents`."""
    type: str
    """Type in the schema: `int | None`."""
    default: str
    """Default in YAML notation, or "" if there is none."""
    text: str
    """Description: the docstring of the field."""


class Group(NamedTuple):
    """One group of settings. The first group has an empty name and holds the run's own keys."""

    name: str
    text: str
    keys: list[Key]


def groups(only: str | None = None) -> list[Group]:
    """List the groups of the config with all their keys.

    Args:
        only: Name of one group, or None for all.

    Raises:
        ConfigError: If no group has the name `only`.
    """
    run = RunConfig()
    found = [_group("", run)]
    found += [_group(part.name, getattr(run, part.name)) for part in _parts(run)]
    if only is None:
        return found
    chosen = [group for group in found if group.name == only]
    if not chosen:
        known = ", ".join(group.name for group in found if group.name)
        raise ConfigError("--keys", only, f"one of: {known}")
    return chosen


def as_text(only: str | None = None) -> str:
    """Return the reference as plain text, for a terminal."""
    lines = []
    for group in groups(only):
        lines += [f"{group.name or 'run'}: {group.text}", ""]
        for key in group.keys:
            lines.append(f"  {key.name}={key.default}  ({key.type})")
            lines += [f"      {line}" for line in key.text.splitlines()]
        lines.append("")
    return "\n".join(lines)


def as_markdown() -> str:
    """Return the reference as the page `docs/config.md`."""
    lines = [
        "# All settings",
        "",
        "<!-- Written by `python launch.py --keys --markdown`; do not edit. -->",
        "",
        "The defaults are those of the schema. `conf/*.yaml` and `experiment=` set others;",
        "`python launch.py --cfg job` shows the values of a run before it starts.",
        "",
    ]
    for group in groups():
        lines += [f"## {group.name or 'The run'}", "", group.text, ""]
        lines += ["| key | type | default | meaning |", "|---|---|---|---|"]
        for key in group.keys:
            cells = (f"`{key.name}`", f"`{key.type}`", f"`{key.default}`", key.text)
            row = " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells)
            lines.append(f"| {row} |")
        lines.append("")
    return "\n".join(lines)


def _group(name: str, config: Any) -> Group:
    kind = type(config)
    texts = field_docstrings(kind)
    keys = []
    for part in fields(kind):
        if is_dataclass(getattr(config, part.name)):
            continue
        full_name = f"{name}.{part.name}" if name else part.name
        text = texts.get(part.name, "")
        keys.append(Key(full_name, str(part.type), _default(part), text))
    return Group(name, inspect.cleandoc(kind.__doc__ or "").split("\n\n")[0], keys)


def _parts(config: Any) -> Iterator[Field[Any]]:
    for part in fields(config):
        if is_dataclass(getattr(config, part.name)):
            yield part


def _default(part: Field[Any]) -> str:
    value = part.default
    if part.default_factory is not MISSING:
        value = part.default_factory()
    if value is MISSING:
        return ""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def field_docstrings(kind: type) -> dict[str, str]:
    """Return the docstring of each field of a dataclass, including inherited fields.

    Python does not keep the docstrings of fields, so they are read from the source.
    """
    texts: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        if not is_dataclass(base):
            continue
        (tree,) = ast.parse(inspect.getsource(base)).body
        assert isinstance(tree, ast.ClassDef)
        for field, below in zip(tree.body, tree.body[1:], strict=False):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(field.target, ast.Name)
                and isinstance(below, ast.Expr)
                and isinstance(below.value, ast.Constant)
            ):
                texts[field.target.id] = inspect.cleandoc(str(below.value.value))
    return texts
