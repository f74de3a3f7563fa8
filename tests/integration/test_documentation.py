"""Execute the commands of the documentation, and check its links, paths, settings and modules.

A comment before each block says how it is tested; see docs/development.md. The name of each test
says what was done: `README.md:24-make`. `pytest -s` prints every command.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import shlex
import subprocess
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest

import launch
from conf.schema.run import RunConfig
from tests.support.documentation.commands import check_commands
from tests.support.documentation.pages import Block, Page, PageError, linked_pages, pages
from tests.support.paths import ROOT
from tests.support.tiny_models import save_gpt2, write_text

PAGES = pages(ROOT)
CHECKED = [block for page in PAGES for block in page.blocks if block.mode not in ("", "run")]
RUN = [page for page in PAGES if any(block.mode == "run" for block in page.blocks)]
_FOLDERS = (
    *("activation_store", "analysis", "benchmarks", "cluster", "conf", "docker", "docs"),
    *("foundation", "sae_core", "tests"),
)
_SETTING = re.compile(r"'?([a-z_]+)\.([a-z_0-9]+)(?=[='\s]|$)")
_SUFFIXES = (".json", ".safetensors", ".yaml")
"""File names may begin like a setting, such as `sae.json`."""


@pytest.mark.parametrize("block", CHECKED, ids=lambda block: f"{block.where}-{block.mode}")
def test_a_command_is_valid(block: Block, tmp_path: Path) -> None:
    if block.mode == "shell":
        assert block.argument, f"{block.where}: expected the reason: <!-- test: shell REASON -->"
        done = subprocess.run(
            ["bash", "-n"], input=block.text, text=True, capture_output=True, check=False
        )
        assert done.returncode == 0, f"{block.where}: {done.stderr}"
        print(f"\n{block.where}: syntax only: {block.argument}")
    elif block.mode == "python-names":
        tree = ast.parse(block.text)
        imports: list[ast.stmt] = [
            node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)
        ]
        exec(compile(ast.Module(imports, []), block.where, "exec"), {})
        print(f"\n{block.where}: compiled, imports executed")
    else:
        for line in check_commands(block, tmp_path):
            print(f"\n{block.where}: {line}")


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(900)
@pytest.mark.parametrize("page", RUN, ids=lambda page: f"{page.name}-run")
def test_the_examples_of_a_page_run(page: Page, tmp_path: Path) -> None:
    save_gpt2(tmp_path / "tiny-model")
    write_text(tmp_path / "tiny.txt", documents=300)
    (tmp_path / ".venv").symlink_to(sys.prefix)
    for name in ("launch.py", "conf"):
        (tmp_path / name).symlink_to(ROOT / name)
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    for block in page.blocks:
        if block.mode == "run":
            command = _script(block)
            done = subprocess.run(
                command, cwd=tmp_path, env=environment, text=True, capture_output=True, check=False
            )
            assert done.returncode == 0, f"{block.where}:\n{done.stdout}\n{done.stderr}"
            print(f"\n{block.where}: ran {command[-1]}{done.stdout}")


def _script(block: Block) -> list[str]:
    """Return the command that runs a block, with the comment's settings for launch.py."""
    if block.language == "python":
        return ["python", "-c", block.text]
    more = [*shlex.split(block.argument), "cache_dir=cache"]
    lines = [
        shlex.join([*words, *more] if any(word.endswith("launch.py") for word in words) else words)
        for words in block.commands
    ]
    return ["bash", "-euc", "\n".join(lines) + "\n"]


@pytest.mark.parametrize("page", linked_pages(ROOT), ids=lambda page: page.name)
def test_links_have_targets(page: Page) -> None:
    assert page.broken_links() == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_names_in_the_text_exist(page: Page) -> None:
    assert unknown_names(page) == []


def unknown_names(page: Page) -> list[str]:
    """List settings, stages, modules, targets and files in code spans that do not exist."""
    settings = _settings()
    groups = {name.partition(".")[0] for name in settings}
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    stages = {"pipeline", "scaling_laws", *launch.STAGES}
    wrong = []
    for number, span in page.code_spans:
        setting = _SETTING.match(span)
        if setting and setting[1] in groups and not span.endswith(_SUFFIXES):
            known = f"{setting[1]}.{setting[2]}" in settings
        elif stage := re.match(r"stage=([a-z_]+)", span):
            known = stage[1] in stages
        elif module := re.match(r"python -m ([\w.]+)", span):
            known = importlib.util.find_spec(module[1]) is not None
        elif target := re.fullmatch(r"make ([a-z-]+)", span):
            known = target[1] in targets
        elif "/" in span and span.partition("/")[0] in _FOLDERS and " " not in span:
            known = bool(list(ROOT.glob(span.rstrip("/"))))
        else:
            continue
        if not known:
            wrong.append(f"{page.name}:{number}: `{span}` not found")
    return wrong


def _settings() -> set[str]:
    config, names = RunConfig(), set()
    for field in fields(config):
        part = getattr(config, field.name)
        if is_dataclass(part):
            names |= {f"{field.name}.{inner.name}" for inner in fields(part)}
    return names


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("```bash\nls\n```\n", "expected a comment"),
        ("<!-- test: skip -->\n```bash\nls\n```\n", "expected a comment"),
        ("```\nls\n```\n", "language ''"),
        ("<!-- test: compose -->\n```bash\nls\n```\n", "unsupported command"),
        ("<!-- test: make -->\n```bash\nmake nothing\n```\n", "No rule to make target"),
        ("<!-- test: compose -->\n```bash\npython launch.py sae.kk=1\n```\n", "did you mean sae.k"),
        ("<!-- test: compose -->\n```bash\npython launch.py sae.k=0\n```\n", "sae.k=0: expected"),
        ("<!-- test: compose -->\n```bash\npython launch.py stage=x\n```\n", "stage='x'"),
        ("<!-- test: parse -->\n```bash\npython -m tests.soak --hours 1\n```\n", "unrecognized"),
        ("<!-- test: parse -->\n```bash\npython -m tests.nothing\n```\n", "not found"),
        ("[a](nothing.md)\n", "file not found"),
        ("# A b\n\n[a](#a-c)\n", "no such heading"),
        ("`sae.kk` is a setting\n", "`sae.kk` not found"),
        ("`sae_core/nothing.py`\n", "not found"),
        ("`stage=nothing`\n", "not found"),
    ],
)
def test_errors_in_a_page_are_reported(text: str, expected: str, tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text(text)
    page = Page(tmp_path, "page.md")
    with pytest.raises(AssertionError, match=re.escape(expected)):
        for block in page.blocks:
            check_commands(block, tmp_path)
        wrong = page.broken_links() + unknown_names(page)
        if wrong:
            raise PageError("\n".join(wrong))
