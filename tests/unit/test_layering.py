"""Test which packages may import which, and that reading a config imports nothing heavy."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FORBIDDEN = {
    "activation_store": {
        "torch",
        "deepspeed",
        "ray",
        "hydra",
        "transformers",
        "sae_core",
        "cluster",
        "analysis",
        "conf",
    },
    "sae_core": {
        "ray",
        "zarr",
        "hydra",
        "omegaconf",
        "transformers",
        "activation_store",
        "cluster",
        "analysis",
        "conf",
    },
    "cluster": {"hydra", "analysis", "benchmarks", "launch"},
    "analysis": {"hydra", "benchmarks", "launch"},
    "benchmarks": {"hydra", "launch"},
}


def imported(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("package", FORBIDDEN)
def test_layers(package):
    for path in (ROOT / package).rglob("*.py"):
        wrong = imported(path) & FORBIDDEN[package]
        assert not wrong, f"{path.relative_to(ROOT)} imports {', '.join(sorted(wrong))}"


def test_reading_a_config_imports_nothing_heavy():
    code = (
        "import sys, conf.schema.run, conf.checks, cluster.run_folder.lock, launch\n"
        "heavy = {'torch', 'ray', 'deepspeed', 'transformers', 'zarr', 'wandb', 'numpy'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
