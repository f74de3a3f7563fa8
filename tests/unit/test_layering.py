"""Test which package imports which, and that no folder is crowded and no module unused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.house import (
    LAYERS,
    MOST_MODULES,
    crowded_folders,
    import_cycles,
    packages_without_layer,
    read_house,
    unused_modules,
    wrong_imports,
)
from tests.support.paths import ROOT

LIBRARIES_KEPT_OUT = {
    "foundation": {"torch", "numpy", "deepspeed", "ray", "hydra", "omegaconf", "transformers"},
    "activation_store": {"torch", "deepspeed", "ray", "hydra", "omegaconf", "transformers"},
    "sae_core": {"ray", "zarr", "hydra", "omegaconf", "transformers"},
    "cluster": {"hydra"},
    "analysis": {"hydra"},
    "benchmarks": {"hydra"},
}


@pytest.fixture(scope="module")
def house():
    return read_house(ROOT)


def test_every_package_is_read(house):
    assert packages_without_layer(ROOT) == []
    read = {name.split(".")[0] for name in house}
    assert read == {package for layer in LAYERS for package in layer}


def test_packages_import_only_lower_layers(house):
    assert wrong_imports(house) == []


def test_no_modules_import_each_other(house):
    assert import_cycles(house) == []


def test_no_folder_is_crowded(house):
    assert crowded_folders(house) == []


def test_every_module_is_used(house):
    assert unused_modules(house) == []


@pytest.mark.parametrize("package", LIBRARIES_KEPT_OUT)
def test_libraries_stay_where_they_belong(house, package):
    for module in house.values():
        if module.name.split(".")[0] == package:
            libraries = {target.split(".")[0] for target in module.imports}
            assert not libraries & LIBRARIES_KEPT_OUT[package], module.path


def write_house(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_an_import_of_a_higher_or_the_same_layer_is_detected(tmp_path):
    write_house(
        tmp_path,
        {
            "conf/checks.py": "def check():\n    from cluster.rank import run_rank\n",
            "cluster/rank.py": "import sae_core.mesh\n",
            "sae_core/mesh.py": "from activation_store import files\n",
            "activation_store/files.py": "import foundation.errors\n",
            "foundation/errors.py": "",
        },
    )
    found = wrong_imports(read_house(tmp_path))
    assert len(found) == 2
    assert "conf/checks.py:2 imports cluster.rank" in found[1]
    assert "sae_core/mesh.py:1 imports activation_store.files" in found[0]


def test_an_import_of_tests_is_detected(tmp_path):
    write_house(
        tmp_path,
        {
            "cluster/rank.py": "def f():\n    from tests.support.ranks import Ranks\n",
            "tests/support/ranks.py": "import cluster.rank\n",
        },
    )
    (found,) = wrong_imports(read_house(tmp_path))
    assert "cluster/rank.py:2 imports tests.support.ranks" in found


def test_a_package_without_a_layer_is_detected(tmp_path):
    write_house(tmp_path, {"sae_core/mesh.py": "", "tests/unit/test_x.py": "", "extra/x.py": ""})
    write_house(tmp_path, {".venv/x.py": "", "docs/page.md": ""})
    assert packages_without_layer(tmp_path) == ["extra"]


def test_an_import_cycle_is_detected_even_inside_functions(tmp_path):
    write_house(
        tmp_path,
        {
            "cluster/a.py": "from cluster import b\n",
            "cluster/b.py": "def f():\n    import cluster.c\n",
            "cluster/c.py": "from cluster.a import g\n",
            "cluster/d.py": "from cluster.a import g\n",
        },
    )
    assert import_cycles(read_house(tmp_path)) == [["cluster.a", "cluster.b", "cluster.c"]]


def test_a_crowded_folder_is_detected(tmp_path):
    write_house(tmp_path, {f"analysis/m{i}.py": "" for i in range(MOST_MODULES)})
    write_house(tmp_path, {"analysis/__init__.py": "", "analysis/__main__.py": ""})
    assert crowded_folders(read_house(tmp_path)) == []
    write_house(tmp_path, {"analysis/one_more.py": ""})
    write_house(tmp_path, {f"tests/unit/test_{i}.py": "" for i in range(MOST_MODULES + 2)})
    one, other = crowded_folders(read_house(tmp_path))
    assert f"{MOST_MODULES + 1} modules" in one and f"{MOST_MODULES + 2} modules" in other


def test_an_unused_module_is_detected(tmp_path):
    write_house(
        tmp_path,
        {
            "launch.py": "STAGES = ['cluster.plan']\nif __name__ == '__main__':\n    pass\n",
            "cluster/plan.py": "from cluster import used\n",
            "cluster/used.py": "",
            "cluster/unused.py": "",
            "cluster/command.py": "if __name__ == '__main__':\n    print()\n",
            "cluster/only_tested.py": "",
            "tests/unit/test_only_tested.py": "from cluster import only_tested\n"
            "from tests.support import used\n",
            "tests/unit/conftest.py": "",
            "tests/support/used.py": "",
            "tests/support/unused.py": "",
        },
    )
    found = unused_modules(read_house(tmp_path))
    assert found == ["cluster.only_tested", "cluster.unused", "tests.support.unused"]


def test_the_config_needs_nothing_heavy():
    code = (
        "import sys, conf.schema.run, conf.checks, cluster.run_folder.opening, launch\n"
        "heavy = {'torch', 'ray', 'deepspeed', 'transformers', 'zarr', 'wandb', 'numpy'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
