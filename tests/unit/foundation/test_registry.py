"""Test the members of a registry: built in, installed, registered; unknown names."""

from __future__ import annotations

import pytest

from foundation.errors import ConfigError, FoundryError
from foundation.registry import Registry


def shapes() -> Registry[object]:
    return Registry("shape", "draw.shape", "shapes", {"path": "pathlib:Path", "gone": "no_such:X"})


def test_a_member_is_imported_when_it_is_looked_up():
    registry = shapes()
    assert registry.names() == ["path", "gone"] and "gone" in registry
    from pathlib import Path

    assert registry["path"] is Path
    with pytest.raises(ModuleNotFoundError):
        registry["gone"]


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ConfigError, match=r"draw.shape='square': expected one of: path, gone$"):
        shapes()["square"]
    with pytest.raises(ConfigError, match=r"other.key='square'"):
        shapes().check("square", "other.key")


def test_a_member_can_be_registered_once():
    registry = shapes()
    with registry.registered("square", 4):
        assert registry["square"] == 4 and registry.names()[-1] == "square"
        with pytest.raises(ValueError, match="'square' already exists"):
            registry.register("square", 5)
    assert "square" not in registry
    with pytest.raises(ValueError, match="'path' already exists"):
        registry.register("path", 5)


def test_an_installed_package_adds_members(tmp_path, monkeypatch):
    (tmp_path / "round_shapes.py").write_text("class Shapes:\n    CIRCLE = 'a circle'\n")
    info = tmp_path / "round_shapes-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: round-shapes\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[latent_foundry.shapes]\ncircle = round_shapes:Shapes.CIRCLE\noval = round_shapes:OVAL\n"
        "[latent_foundry.forms]\npath = round_shapes:Shapes\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    registry = shapes()
    assert registry["circle"] == "a circle"
    with pytest.raises(FoundryError, match=r"'oval' of round-shapes could not .*fix or uninstall"):
        registry["oval"]
    forms: Registry[object] = Registry("form", "draw.form", "forms", {"path": "pathlib:Path"})
    for _ in range(2):  # also when it is asked again
        with pytest.raises(
            FoundryError, match="round-shapes declares the form 'path', which already"
        ):
            forms.names()
