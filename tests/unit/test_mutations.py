"""Test that the snippets and tests named in the tables of mutations exist."""

from __future__ import annotations

import ast
from types import ModuleType

import pytest

from tests.mutation.mutation import FAULTS, Edit, Mutation
from tests.mutation.runner import mutated
from tests.mutation.tables import ALL, MUTATIONS, TABLES
from tests.support.paths import ROOT


def test_every_fault_has_a_mutation() -> None:
    assert sorted(FAULTS) == list(range(1, 23)) == sorted({m.fault for m in MUTATIONS})


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.__name__)
def test_a_table_holds_the_mutations_of_its_package(table: ModuleType) -> None:
    packages = {name.__name__.rpartition(".")[2] for name in TABLES}
    for mutation in table.MUTATIONS:
        package = mutation.edits[0].file.partition("/")[0]
        expected = package if package in packages else "project"
        assert table.__name__ == f"tests.mutation.{expected}", mutation.what


@pytest.mark.parametrize("mutation", ALL, ids=lambda mutation: mutation.what)
def test_a_mutation_applies_and_its_tests_exist(mutation: Mutation) -> None:
    texts: dict[str, str] = {}
    for edit in mutation.edits:
        texts[edit.file] = mutated(texts.get(edit.file) or (ROOT / edit.file).read_text(), edit)
    for file, text in texts.items():
        assert text != (ROOT / file).read_text()
        if file.endswith(".py"):
            ast.parse(text)
    for test in mutation.tests:
        file, _, name = test.partition("::")
        functions = {
            node.name
            for node in ast.walk(ast.parse((ROOT / file).read_text()))
            if isinstance(node, ast.FunctionDef)
        }
        assert not name or name.partition("[")[0] in functions, test


@pytest.mark.parametrize("text", ["a = 2\n", "a = 1\na = 1\n"])
def test_a_snippet_must_occur_exactly_once(text: str) -> None:
    with pytest.raises(ValueError, match=r"f\.py: [02] times 'a = 1'"):
        mutated(text, Edit("f.py", "a = 1", "a = 3"))
