"""Test that the reference of all settings is complete and that its page is up to date."""

from __future__ import annotations

from dataclasses import dataclass, field

from omegaconf import OmegaConf

from conf.reference import as_markdown, field_docstrings, groups
from conf.schema.run import RunConfig
from conf.tree import changed_settings, config_tree
from sae_core.config import TopKConfig
from tests.support.paths import ROOT


def leaves(prefix: str, value: object) -> set[str]:
    if not isinstance(value, dict):
        return {prefix}
    inner = (leaves(f"{prefix}.{key}" if prefix else key, part) for key, part in value.items())
    return set().union(*inner)


def test_every_key_of_the_config_is_explained():
    container = OmegaConf.to_container(OmegaConf.structured(RunConfig()))
    keys = [key for group in groups() for key in group.keys]
    assert {key.name for key in keys} == leaves("", container)
    assert [key.name for key in keys if not key.text] == []
    assert [group.name for group in groups() if not group.text] == []


def test_the_page_of_all_settings_is_up_to_date():
    page = ROOT / "docs" / "config.md"
    assert page.read_text() == as_markdown(), (
        "run: python launch.py --keys --markdown > docs/config.md"
    )


@dataclass
class Base:
    """A base."""

    a: int = 1
    """First
    and second line."""
    b: list[int] = field(default_factory=list)


@dataclass
class Derived(Base):
    """A derived class."""

    b: list[int] = field(default_factory=list)
    """Explained here."""
    c: str = ""


def test_docstrings_of_fields_are_inherited():
    assert field_docstrings(Derived) == {"a": "First\nand second line.", "b": "Explained here."}


def test_only_changed_settings_are_shown_at_the_start():
    config = RunConfig(name="x")
    assert changed_settings(config, RunConfig(name="x")) == {}
    config.sae = TopKConfig(k=7)
    config.data.path = "[red]text.txt"
    found = changed_settings(config, RunConfig(name="x"))
    assert found == {"data.path": "[red]text.txt", "sae.k": 7}
    shown = [str(branch.label) for branch in config_tree(config).children]
    assert len(shown) == 2 and "[dim]k[/dim] 7" in shown[1] and "\\[red]" in shown[0]
