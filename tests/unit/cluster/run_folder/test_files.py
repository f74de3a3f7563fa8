"""Test that the name of every file in a run's folder is defined in one place."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from cluster.run_folder import files, submitted_jobs
from sae_core import config
from tests.support.house import LAYERS
from tests.support.paths import ROOT

HOMES = {
    **{value: files for name, value in vars(files).items() if name.isupper()},
    config.CHECKPOINTS: config,
    submitted_jobs.FOLDER: submitted_jobs,
    submitted_jobs.JOBS: submitted_jobs,
}
"""Name or relative path -> the module that defines it."""
PARTS = {part for path in HOMES for part in path.split("/")} - {
    "index.html",  # the folder of scaling laws has one as well
}
UNMISTAKABLE = {name for name in {*HOMES, *PARTS} if not name.isalpha()}
PATH_CALLS = {"Path", "joinpath", "join", "with_name"}
RANK_FILE = re.compile(r"rank-\{\}\.(log|heartbeat)")


def names_in(source: str) -> list[tuple[int, str]]:
    """Return (line, name) of every literal that names a file in a run's folder.

    A word like "report" counts only where a path is built; one like "metrics.jsonl" everywhere.
    """
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and node.value in UNMISTAKABLE:
            found.append((node.lineno, str(node.value)))
        if isinstance(node, ast.JoinedStr):
            text = "".join(
                str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values
            )
            if RANK_FILE.search(text):
                found.append((node.lineno, text))
        found += [
            (part.lineno, str(part.value))
            for part in path_parts(node)
            if isinstance(part, ast.Constant) and part.value in PARTS
        ]
    return sorted(set(found))


def path_parts(node: ast.AST) -> list[ast.expr]:
    """Return the operands of `/`, and the arguments of calls that build a path."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
        return [node.left, node.right]
    if isinstance(node, ast.Call):
        called = node.func.attr if isinstance(node.func, ast.Attribute) else None
        called = node.func.id if isinstance(node.func, ast.Name) else called
        return list(node.args) if called in PATH_CALLS else []
    return []


def test_names_of_run_files_are_defined_once() -> None:
    homes = {Path(str(module.__file__)) for module in HOMES.values()}
    # Tests spell names out: they check what a user finds.
    packages = [package for layer in LAYERS for package in layer if package != "tests"]
    paths = [path for package in packages for path in (ROOT / package).rglob("*.py")]
    again = [
        f"{path.relative_to(ROOT)}:{line} {name!r}"
        for path in [*paths, ROOT / "launch.py"]
        if path not in homes
        for line, name in names_in(path.read_text(encoding="utf-8"))
    ]
    assert again == [], "use the constants and functions of cluster/run_folder/files.py"


def test_literal_names_are_detected() -> None:
    for source, name in (
        ('open(folder / "metrics.jsonl")', "metrics.jsonl"),
        ('file = "eval/metrics.json"', "eval/metrics.json"),
        ('file.with_name("frequency.json")', "frequency.json"),
        ('run_dir / "checkpoints"', "checkpoints"),
        ('run_dir / "report" / "index.html"', "report"),
        ('os.path.join(run_dir, "logs")', "logs"),
        ('Path("runs", "export")', "export"),
        ('(run_dir / "submit" / name)', "submit"),
        ('folder / f"rank-{rank}.heartbeat"', "rank-{}.heartbeat"),
        ('lock = "driver.lock"', "driver.lock"),
    ):
        assert names_in(source) == [(1, name)], source
    # Words of the same spelling that name no file.
    for source in ('stage == "report"', 'costs["checkpoints"]', '"see metrics.jsonl"', '"eval"'):
        assert names_in(source) == [], source


def test_files_of_a_rank(tmp_path: Path) -> None:
    assert files.rank_log(tmp_path, 3) == tmp_path / "logs" / "rank-3.log"
    assert files.rank_heartbeat(tmp_path, 0) == tmp_path / "logs" / "rank-0.heartbeat"
