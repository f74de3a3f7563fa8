"""Test that the snippets and tests named in the table of mutations exist."""

from __future__ import annotations

import ast

import pytest

from tests.mutation.runner import mutated
from tests.mutation.table import EXTRA, FAULTS, MUTATIONS, Edit, Mutation
from tests.support.paths import ROOT


def test_every_fault_has_a_mutation() -> None:
    assert sorted(FAULTS) == list(range(1, 23)) == sorted({m.fault for m in MUTATIONS})


@pytest.mark.parametrize("mutation", [*MUTATIONS, *EXTRA], ids=lambda mutation: mutation.what)
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
